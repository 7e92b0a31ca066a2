"""Evaluation of a split: every sample exactly once, in lockstep over ranks, rows gathered on rank 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from mmpeft_ds.engine.frozen_images import FrozenImages
from mmpeft_ds.engine.streams import items_of
from mmpeft_ds.engine.text_counts import CHANGES, TextCounts
from mmpeft_ds.engine.turns import exhausted
from mmpeft_ds.errors import AgreedBadInput, BadInput


@dataclass
class Evaluation:
    """Result of evaluating one split.

    Attributes:
        scores: metrics of the task and `loss`, on every rank.
        rows: predictions ordered by sample id, on rank 0 only; empty elsewhere.
        scored, there: number of questions, captions or samples that the scores count, and number in the source, on
            every rank; see `count`.
        unit: what these numbers count, in the plural.
        bad: number of samples that could not be read and are left out, on every rank.
        texts: texts that were cut to fit or hold control tokens, on every rank.
        weight: total weight of the loss, on every rank.
        pictures: (image (3, H, W) in [0, 1], its rows) of rank 0's share, up to the number asked for; None for
            an image that is not there.
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


def evaluate(*args: Any, **kwargs: Any) -> Evaluation | None:
    """Run `evaluating` to its end. Collective."""
    return exhausted(evaluating(*args, **kwargs))


@torch.no_grad()
def evaluating(
    model: Any,
    backbone: Any,
    task: Any,
    steps: Iterable[Any],
    device: torch.device | str,
    pictures: int = 0,
    stop_requested: Callable[[], bool] = lambda: False,
    thumbnail: Callable[[str], Tensor | None] | None = None,
    frozen: FrozenImages | None = None,
) -> Generator[int, None, Evaluation | None]:
    """Run `model` over `steps` of a stream and score it. Collective.

    Yields the number of each step before it is read, so that several models can take turns.

    Args:
        model: DeepSpeed engine or plain module; its mode is restored afterwards.
        steps: `Stream(..., train=False).epoch(...)`, with equally many steps and micro-batches on every rank.
        pictures: images to keep for the page of predictions.
        stop_requested: whether a stop was requested of this process.
        thumbnail: sample id -> small picture, for batches that hold no pixels.
        frozen: computes the outputs of frozen towers for images, or reads stored ones.

    Returns:
        None if a stop was requested on a rank before the end.

    Raises:
        AgreedBadInput: if the data of some rank cannot be read.
    """
    training = [m for m in model.modules() if m.training]
    model.eval()
    gathered = _Gathered(task, pictures, thumbnail)
    numbered, number, stopped = _together(steps, device), 0, False
    while True:
        yield number
        step, number = next(numbered, None), number + 1
        if step is None:
            break
        bits = [x for b in step.micro for x in modality.present(b)]
        failed, stop, *anywhere = collectives.sum_scalars([0.0, float(stop_requested()), *bits], device)
        if failed:
            raise AgreedBadInput(collectives.first_message(""))
        if stop:
            stopped = True
            break
        gathered.bad += sum(len(b.bad) for b in step.micro)
        bits = [anywhere[i : i + modality.WIDTH] for i in range(0, len(anywhere), modality.WIDTH)]
        passes = frozen.passes(step.micro, bits) if frozen else [0] * len(bits)
        for batch, present, times in zip(step.micro, bits, passes, strict=True):
            if not any(present):  # padding on every rank
                continue
            complete = modality.complete(batch, present, backbone, task, frozen is not None).to(device)
            if frozen:
                complete = frozen.fill(complete, times)
            gathered.add(complete, answer(model, backbone, task, complete, scores=True), batch.changed_texts())
    result = None if stopped else gathered.evaluation(getattr(model, "module", model), device)
    for module in training:
        module.training = True
    return result


class _Gathered:
    """Sums, rows and pictures of the batches of a split that this rank has evaluated.

    Args:
        pictures, thumbnail: of `evaluating`.
    """

    def __init__(self, task: Any, pictures: int, thumbnail: Callable[[str], Tensor | None] | None):
        self.task, self.wanted, self.thumbnail = task, pictures, thumbnail
        self.rows: list[dict[str, Any]] = []
        self.parts: list[Any] = []  # for tasks that need the whole split before they can answer
        self.pictures: list[tuple[Tensor | None, list[dict[str, Any]]]] = []
        self.sums: list[tuple[float, float]] = []  # loss and weight of each batch
        self.bad = 0
        self.changed = [0] * CHANGES
        self.graph: graph_health.View | None = None

    def add(self, batch: PackedBatch, outputs: Any, changed: Sequence[int]) -> None:
        """Add a batch; `changed` is `PackedBatch.changed_texts` of it."""
        task = self.task
        self.changed = [a + b for a, b in zip(self.changed, changed, strict=True)]
        self.sums.append((float(task.loss(outputs, batch)), float(task.weight(batch))))
        predictions = task.predict(outputs, batch)
        if task.concludes:
            self.parts.append(task.collect(outputs, batch))
        else:
            self.rows += predictions
        if collectives.rank() == 0 and len(self.pictures) < self.wanted:
            self.pictures += _pictures(batch, predictions, self.wanted - len(self.pictures), self.thumbnail)
        if collectives.rank() == 0 and self.wanted and self.graph is None:
            self.graph = graph_health.view(outputs, batch, predictions)

    def evaluation(self, model: Any, device: torch.device | str) -> Evaluation:
        """The result of all ranks; `model` is the plain module. Collective."""
        task, rows, pictures = self.task, self.rows, self.pictures
        if task.concludes:
            rows = task.conclude(model, self.parts, device)
            pictures = [(image, _concluded(mine, rows)) for image, mine in pictures]
        bad, *changed = collectives.sum_scalars([self.bad, *self.changed], device)
        batches = collectives.gather_everywhere(self.sums)
        loss, weight = _exact([loss for loss, _ in batches]), _exact([weight for _, weight in batches])
        texts = TextCounts()
        texts.add(task, changed)
        rows = collectives.gather_to_first(rows) or []
        rows.sort(key=lambda row: row["sample_id"])  # stable: texts of a sample keep their order
        scores = on_rank0(lambda: dict(task.score(rows)))
        scores["loss"] = loss / weight if weight else float("nan")
        graph = graph_health.picture(self.graph, self.thumbnail) if self.graph is not None else None
        return Evaluation(scores, rows, pictures, int(bad), graph, texts=texts, weight=weight)


def count(evaluation: Evaluation, source: ResolvedSource) -> Evaluation:
    """Set how many items of a source an evaluation has scored, and return it. Collective."""
    numbers = on_rank0(lambda: (source.task.scored(evaluation.rows), items_of(source)))
    evaluation.scored, evaluation.there = numbers
    evaluation.unit = source.task.unit
    return evaluation


def _together(steps: Iterable[Any], device: torch.device | str) -> Iterator[Any]:
    """`steps`; a rank whose data cannot be read joins the all-reduce of that step, so that all ranks end."""
    try:
        yield from steps
    except BadInput as problem:
        # Evaluation does not accumulate, so there is one micro-batch per step.
        collectives.sum_scalars([1.0] + [0.0] * (1 + modality.WIDTH), device)
        raise AgreedBadInput(collectives.first_message(str(problem))) from problem


def _exact(values: Sequence[float]) -> float:
    """Their sum, the same in any order, and so for any number of ranks."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _concluded(mine: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows about the sample of `mine` that the task gave at the end of the split, such as the results of a search."""
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
