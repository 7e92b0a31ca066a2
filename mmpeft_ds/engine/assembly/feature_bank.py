"""Bank of a feature model, read from feature shards: class texts, and the support samples of all ranks."""

# C classes, M support samples, V passes, D width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data import feature_shards
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.gather import gather_rows
from mmpeft_ds.errors import AgreedBadInput, BadInput


def towers_of(manifests: list[Manifest]) -> dict[str, Any]:
    """The towers that made the features of all these data sets; empty for shards of pixels. Raises BadInput."""
    feature_shards.check_same_towers(manifests)
    return manifests[0].towers


def shapes(sources: list[Any], labels: list[str] | None, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The bank on the meta device, for checks before anything is read, with as many support samples of each class;
    empty without stored features.

    Args:
        sources: train sources (`engine.resolve.ResolvedSource`).
        wanted: parts beside the class texts, which are always there.
    """
    towers = sources[0].manifest.towers
    if not towers:
        return {}
    classes, width = len(labels or []), towers["image_width"]
    bank = {}
    for name, key in (("positive", "templates"), ("negative", "negative_templates")):
        count = len(towers.get(key) or [])
        if _comparable(towers) and count and (name == "positive" or "negative" in wanted):
            bank[name] = torch.empty(classes, count, width, device="meta")
    if "support" in wanted:
        samples = sum(source.samples for source in sources)
        bank["support"] = torch.empty(samples, max(1, towers.get("views", 0)), width, device="meta")
        bank["support_labels"] = torch.arange(samples) * classes // max(1, samples)
    return bank


def read(sources: list[Any], labels: list[str] | None, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The bank itself, the same on every rank; each reads its share of the support samples. Collective.

    Raises:
        AgreedBadInput: on all ranks: files that are missing or altered, a class that the data set does not know.
    """
    labels = labels or []
    if not sources[0].manifest.towers:
        return {}
    problem, bank, mine = "", {}, None
    try:
        if _comparable(sources[0].manifest.towers):
            bank = _texts(sources, labels, "negative" in wanted)
        if "support" in wanted:
            mine = _support(sources, labels)
    except BadInput as error:
        problem = str(error)
    if problem := collectives.first_message(problem):
        raise AgreedBadInput(problem)
    if mine is not None:
        images, classes, names = mine
        everyone = collectives.gather_everywhere(names)
        images, classes = gather_rows(images), gather_rows(classes)
        order = sorted(range(len(everyone)), key=lambda i: (int(classes[i]), everyone[i]))
        bank["support"], bank["support_labels"] = images[order], classes[order]
    return bank


def _comparable(towers: dict[str, Any]) -> bool:
    """Whether class texts are stored in the space of the images."""
    return bool(towers.get("classes")) and towers["image_width"] == towers["text_width"]


def _texts(sources: list[Any], labels: list[str], negative: bool) -> dict[str, Tensor]:
    rows: dict[str, dict[str, Tensor]] = {"positive": {}, "negative": {}}
    for source in sources:
        manifest = source.manifest
        for name, tensor in feature_shards.class_texts(manifest).items():
            for label, row in zip(manifest.labels or [], tensor, strict=False):
                rows[name].setdefault(label, row)
    texts = {}
    for name, of_class in rows.items():
        if of_class and (name == "positive" or negative):
            texts[name] = torch.stack([of_class[label] for label in labels])
    return texts


def _support(sources: list[Any], labels: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    """Passes (n, V, D), class indices and sample ids of this rank's share."""
    index = {label: i for i, label in enumerate(labels)}
    images, classes, names = [], [], []
    for source in sources:
        manifest, options = source.manifest, source.options
        stored = feature_shards.read_features(
            manifest, options.split, options.subset, collectives.rank(), collectives.world_size()
        )
        mapped = torch.tensor([index.get(label, -1) for label in manifest.labels or []], dtype=torch.int64)
        known = stored.label >= 0
        known[known.clone()] = mapped[stored.label[known]] >= 0
        passes = stored.image[:, 1:] if stored.image.shape[1] > 1 else stored.image
        images.append(passes[known])
        classes.append(mapped[stored.label[known]])
        names += [f"{manifest.name}/{key}" for key, keep in zip(stored.key, known.tolist(), strict=True) if keep]
    return torch.cat(images), torch.cat(classes), names
