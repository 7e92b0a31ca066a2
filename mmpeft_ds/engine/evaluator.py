"""Evaluation of a split: every sample exactly once, in lockstep over ranks, rows gathered on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine import graph_health
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.engine.assembly.forward import answer
from mmpeft_ds.engine.assembly.resolve import ResolvedSource
from mmpeft_ds.engine.streams import items_of
from mmpeft_ds.engine.text_counts import CHANGES, TextCounts
from mmpeft_ds.errors import AgreedBadInput, BadInput


@dataclass
class Evaluation:
    """Result of evaluating one split.

    Attributes:
        scores: metrics of the task and `loss`, on every rank.
        rows: predictions ordered by sample id, on rank 0 only; empty elsewhere.
        scored, there: how many questions, captions or samples the scores rest on, and how many the source has, on
            every rank; see `count`.
        unit: what they are, in the plural.
        bad: number of samples that could not be read and are left out, on every rank.
        texts: texts that were cut to fit or hold control tokens, on every rank.
        weight: total weight of the loss, on every rank.
        pictures: (image (3, H, W) in [0, 1], its rows) of rank 0's share, up to the number asked for; None in the
            place of an image that nobody has.
        graph: picture (3, H, W) in [0, 1] of the graph among rank 0's rows of the first batch, if pictures are asked
            for and the model makes a graph.
    """

    scores: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[tuple[Tensor | None, list[dict[str, Any]]]] = field(default_factory=list)
    bad: int = 0
    graph: Tensor | None = None
    scored: int = 0
    there: int = 0
    unit: str = "samples"
    texts: TextCounts = field(default_factory=TextCounts)
    weight: float = 0.0

    @property
    def counted(self) -> str:
        """`72 of 72 questions`, what was left out, and what was cut."""
        bad = f", {self.bad:,} bad samples left out" if self.bad else ""
        changed = f", {self.texts.words()}" if self.texts else ""
        return f"{self.scored:,} of {self.there:,} {self.unit}{bad}{changed}"


@torch.no_grad()
def evaluate(
    model: Any,
    backbone: Any,
    task: Any,
    steps: Iterable[Any],
    device: torch.device | str,
    pictures: int = 0,
    stop_requested: Callable[[], bool] = lambda: False,
    thumbnail: Callable[[str], Tensor | None] | None = None,
) -> Evaluation | None:
    """Run `model` over `steps` of a stream and score it. Collective.

    Args:
        model: DeepSpeed engine or plain module; its mode is restored afterwards.
        steps: `Stream(..., train=False).epoch(...)`, with equally many steps and micro-batches on every rank.
        pictures: images to keep for the page of predictions.
        stop_requested: whether a stop was requested of this process.
        thumbnail: sample id -> small picture, for batches that hold no pixels.

    Returns:
        None if a stop was requested on a rank before the end.

    Raises:
        AgreedBadInput: if the data of some rank cannot be read.
    """
    training = [m for m in model.modules() if m.training]
    model.eval()
    rows: list[dict[str, Any]] = []
    parts: list[Any] = []  # for tasks that need the whole split before they can answer
    kept: list[tuple[Tensor | None, list[dict[str, Any]]]] = []
    loss_sum, weight_sum, bad, stopped = 0.0, 0.0, 0, False
    changed = [0] * CHANGES
    seen: graph_health.View | None = None
    for step in _together(steps, device):
        bits = [x for b in step.micro for x in modality.present(b)]
        failed, stop, *anywhere = collectives.sum_scalars([0.0, float(stop_requested()), *bits], device)
        if failed:
            raise AgreedBadInput(collectives.first_message(""))
        if stop:
            stopped = True
            break
        bad += sum(len(b.bad) for b in step.micro)
        for i, batch in enumerate(step.micro):
            present = anywhere[i * len(modality.MODALITIES) : (i + 1) * len(modality.MODALITIES)]
            if not any(present):  # padding on every rank
                continue
            changed = [a + b for a, b in zip(changed, batch.changed_texts(), strict=True)]
            batch = modality.complete(batch, present, backbone, task).to(device)
            outputs = answer(model, backbone, task, batch, scores=True)
            loss_sum += float(task.loss(outputs, batch))
            weight_sum += task.weight(batch)
            predictions = task.predict(outputs, batch)
            if task.concludes:
                parts.append(task.collect(outputs, batch))
            else:
                rows += predictions
            if collectives.rank() == 0 and len(kept) < pictures:
                kept += _pictures(batch, predictions, pictures - len(kept), thumbnail)
            if collectives.rank() == 0 and pictures and seen is None:
                seen = graph_health.view(outputs, batch, predictions)
    if task.concludes and not stopped:
        rows = task.conclude(getattr(model, "module", model), parts, device)
        kept = [(image, _concluded(mine, rows)) for image, mine in kept]
    for module in training:
        module.training = True
    if stopped:
        return None
    loss_sum, weight_sum, bad, *changed = collectives.sum_scalars([loss_sum, weight_sum, bad, *changed], device)
    texts = TextCounts()
    texts.add(task, changed)
    gathered = collectives.gather_to_first(rows) or []
    gathered.sort(key=lambda row: row["sample_id"])  # stable: texts of a sample keep their order
    scores = on_rank0(lambda: dict(task.score(gathered)))
    loss = loss_sum / weight_sum if weight_sum else float("nan")
    drawn = graph_health.picture(seen, thumbnail) if seen is not None else None
    return Evaluation({**scores, "loss": loss}, gathered, kept, int(bad), drawn, texts=texts, weight=weight_sum)


def count(evaluation: Evaluation, source: ResolvedSource) -> Evaluation:
    """Say how much of a source an evaluation rests on, and return it. Collective."""
    numbers = on_rank0(lambda: (source.task.scored(evaluation.rows), items_of(source)))
    evaluation.scored, evaluation.there = numbers
    evaluation.unit = source.task.unit
    return evaluation


def _together(steps: Iterable[Any], device: torch.device | str) -> Iterator[Any]:
    """`steps`; a rank whose data fails takes part in the all-reduce of that step, so that all ranks end."""
    try:
        yield from steps
    except BadInput as problem:
        # Evaluation does not accumulate, so there is one micro-batch per step.
        collectives.sum_scalars([1.0] + [0.0] * (1 + len(modality.MODALITIES)), device)
        raise AgreedBadInput(collectives.first_message(str(problem))) from problem


def _concluded(mine: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows about the sample of `mine` that a task gave at the end of the split: what was found for its image."""
    concluded = [row for row in rows if row["sample_id"] == mine[0]["sample_id"] and not row.get("text")]
    return concluded or mine


def _pictures(
    batch: PackedBatch,
    rows: list[dict[str, Any]],
    limit: int,
    thumbnail: Callable[[str], Tensor | None] | None = None,
) -> list[tuple[Tensor | None, list[dict[str, Any]]]]:
    """First image of each good slot, stretched to [0, 1], with the rows of that slot.

    Stored features show their thumbnail, or None where there is none.
    """
    pixels = next((v for v in batch.images.values() if v.dim() == 4 and v.shape[1] == 3), None)
    chosen: list[tuple[Tensor | None, list[dict[str, Any]]]] = []
    if pixels is None:
        of_sample: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            of_sample.setdefault(row["sample_id"], []).append(row)
        return [(thumbnail(name) if thumbnail else None, of_sample[name]) for name in list(of_sample)[:limit]]
    owners = batch.image_owner.tolist()
    for slot, sample_id in enumerate(batch.sample_id):
        mine = [row for row in rows if row["sample_id"] == sample_id]
        if len(chosen) < limit and mine and slot in owners:
            image = pixels[owners.index(slot)].float().cpu()
            low, high = image.amin(), image.amax()
            chosen.append(((image - low) / (high - low).clamp(min=1e-6), mine))
    return chosen
