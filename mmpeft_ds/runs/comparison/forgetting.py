"""Loss of a model on a second task with its adapter on and off: how much the adapter spoils what the base could do.

The base is frozen, so with the adapter off nothing is ever forgotten. In use the adapter is on for whatever is asked,
and this measures what that costs on data it has not seen. Which loss follows from what the backbone gives:

captions     of a model that generates: the loss per token of the captions beside their pictures
pairs        of two towers with features of both: contrastive loss and recall@1 of captions for their pictures
texts        of a text encoder after a picture: contrastive loss and recall@1 of two descriptions of the same thing,
             all read beside one grey picture, their vectors the means over the tokens of the last layer
"""

# N items, E vector width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds import adapter
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.shards import ShardReader, image_names, members, record_of
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput, BadSample

SCALE = 20.0  # of cosines before the softmax, with which sentence encoders of this kind were trained
GREY = torch.full((3, 64, 64), 128, dtype=torch.uint8)


@dataclass(frozen=True)
class Item:
    """One sample of the second task: a picture's bytes, its caption, and a second description or none."""

    image: bytes
    caption: str
    other: str


def measure(directory: Path, data: str, split: str, most: int, batch: int = 16) -> dict[str, Any]:
    """Loss on a second task with an adapter on, and off.

    Args:
        directory: adapter directory.
        data: directory of prepared shards with `captions`; of no use where the adapter was trained on it.
        most: samples that are taken, evenly spread over the split.
        batch: samples at a time.

    Returns:
        `task` (of this module), `data`, `samples`, `before` and `after` (mappings of `loss`, and `recall@1` where
        there is one), and `forgetting`, the loss after less that before.

    Raises:
        BadInput: no such data, too few samples that serve, or a backbone that gives none of the three.
    """
    loaded = adapter.load(directory, "cuda" if torch.cuda.is_available() else "cpu")
    task, score = _task_of(loaded)
    items = [item for item in items_of(data, split, most) if item.other or task != "texts"]
    if len(items) < 2:
        what = "two descriptions of a picture" if task == "texts" else "captions"
        raise BadInput(f"{data} ({split}): {len(items)} samples with {what}, and 2 are the least. Take other data.")
    with torch.no_grad():
        after = score(loaded, items, batch)
        with loaded.model.disable_adapter():
            before = score(loaded, items, batch)
    return {
        "task": task,
        "data": f"{Manifest.load(data).name}-{split}",
        "samples": len(items),
        "before": before,
        "after": after,
        "forgetting": after["loss"] - before["loss"],
    }


def items_of(data: str, split: str, most: int) -> list[Item]:
    """At most so many samples of a split, evenly spread. What cannot be read, or lacks a caption, is left out."""
    manifest = Manifest.load(data)
    places = [(n, i) for n, shard in enumerate(manifest.shards(split)) for i in range(shard.samples)]
    chosen = [places[k * len(places) // most] for k in range(most)] if len(places) > most else places
    reader = ShardReader(manifest, split)
    try:
        return [item for piece in reader.read(chosen) if (item := _item(piece)) is not None]
    finally:
        reader.close()


def _item(piece: bytes | BadSample) -> Item | None:
    if isinstance(piece, BadSample):
        return None
    try:
        parts = members(piece)[1]
        captions, names = record_of(parts).get("captions") or [], image_names(parts)
    except BadSample:
        return None
    if not captions or not names:
        return None
    # A longer description often begins with the shorter one, and would be found by those words alone.
    other = captions[-1].removeprefix(captions[0]).strip(" ,.;:")
    return Item(parts[names[0]], captions[0], other)


def _task_of(loaded: adapter.Loaded) -> tuple[str, Callable[..., dict[str, float]]]:
    if loaded.backbone.generates:
        return "captions", _captions
    probe = _outputs(loaded, [loaded.sample("probe", GREY, ["a"])])
    if getattr(probe, "text_features", None) is not None and getattr(probe, "image_features", None) is not None:
        return "pairs", _pairs
    if hasattr(probe, "last_hidden_state"):
        return "texts", _texts
    name = loaded.recipe.backbone["name"]
    raise BadInput(f"backbone {name}: gives neither text, nor features of pictures and texts. Measure no forgetting.")


def _outputs(loaded: adapter.Loaded, samples: Sequence[Any]) -> Any:
    return forward(loaded.model, loaded.backbone, loaded.pack(samples, 0))


def _captions(loaded: adapter.Loaded, items: Sequence[Item], batch: int) -> dict[str, float]:
    total = tokens = 0.0
    for part in _parts(items, batch):
        samples = []
        for item in part:
            sample = loaded.sample("second task", item.image, [""])
            sample.texts = [Prompted("", item.caption)]
            samples.append(sample)
        losses, counts = _outputs(loaded, samples).token_losses()
        total, tokens = total + float(losses.double().sum()), tokens + int(counts.sum())
    return {"loss": total / tokens}


def _pairs(loaded: adapter.Loaded, items: Sequence[Item], batch: int) -> dict[str, float]:
    images, texts = [], []
    for part in _parts(items, batch):
        out = _outputs(loaded, [loaded.sample("second task", item.image, [item.caption]) for item in part])
        images.append(out.image_features.float())
        texts.append(out.text_features.float())
    return contrast(torch.cat(images), torch.cat(texts))


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _texts(loaded: adapter.Loaded, items: Sequence[Item], batch: int) -> dict[str, float]:
    sides = ([item.caption for item in items], [item.other for item in items])
    one, other = (torch.cat(list(_sentences(loaded, texts, batch))) for texts in sides)
    return contrast(one, other)


def _sentences(loaded: adapter.Loaded, texts: Sequence[str], batch: int) -> Iterator[Tensor]:
    """Mean over the tokens of each text, (n, E) a batch; the vector of the picture before them is left out."""
    for part in _parts(texts, batch):
        inputs = loaded.backbone.inputs(loaded.pack([loaded.sample("second task", GREY, list(part))], 0))
        hidden = loaded.model(**inputs, return_last_hidden_state=True).last_hidden_state.float()
        keep = inputs["attention_mask"].float().unsqueeze(2)
        yield (hidden[:, -keep.shape[1] :] * keep).sum(1) / keep.sum(1)


def contrast(one_NE: Tensor, other_NE: Tensor) -> dict[str, float]:
    """Contrastive loss of N pairs, mean of both directions, and the share whose nearest of the other side is its own.

    Args:
        one_NE, other_NE: rows of a pair have the same number; any scale.
    """
    score = torch.nn.functional.normalize(one_NE, dim=1) @ torch.nn.functional.normalize(other_NE, dim=1).T
    own = torch.arange(len(score), device=score.device)
    losses = [torch.nn.functional.cross_entropy(SCALE * s, own) for s in (score, score.T)]
    hits = [(s.argmax(1) == own).float().mean() for s in (score, score.T)]
    return {"loss": float(sum(losses)) / 2, "recall@1": float(sum(hits)) / 2}
