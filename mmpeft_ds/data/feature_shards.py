"""Feature shards: data sets whose samples hold precomputed features of images and captions, instead of pixels.

    KEY.npy        (1 + V, Dv) image features, not normalised: row 0 of the evaluation transform, rows 1.. of V
                   augmented passes; with several images, one dimension more in front
    KEY.text.npy   (n, Dt) features of the n captions; absent without captions
    KEY.json       the record of the source, and `source_id`, the sample's id there
    KEY.jpg        a thumbnail, if wanted, for display only

`Manifest.towers` describes the towers: `key` (hash of the towers' weights, the image transform and the choice of
feature), `compute` (dtype of the towers), `backbone` (its section of a recipe), `dtype`, `views`, `view_scale`,
`seed`, `image_width`, `text_width`, `logit_scale`, `templates`, `negative_templates`, `classes` ({file, sha256} of the
class texts). Features of different towers cannot be compared, so they are never mixed, see `check_same_towers`.
"""

# C classes, T templates, V augmented passes, D (Dv, Dt) widths, n samples of this rank

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from mmpeft_ds.data.manifest import FILE, Manifest, read_side_file
from mmpeft_ds.data.parsing import npy_array, one_sample
from mmpeft_ds.data.shards import ShardReader, members, record_of
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.files import write_atomic

log = logging.getLogger(__name__)
HINT = "Restore it, or make the features again with launchers/features.py"
CHUNK = 512  # samples read at a time
_SLOT = re.compile(r"\b(?:an?|the)\s+(?=\{\})|(?=\{\})", re.IGNORECASE)


@dataclass
class StoredFeatures:
    """Features of one rank's share of a split, in the order of the split.

    Attributes:
        image: (n, 1 + V, Dv) float32, row 0 of the evaluation transform; of several images, the first one's.
        text: (T, Dt) float32, all captions of all samples.
        text_owner: (T,) int64, index of the sample that each caption belongs to, non-decreasing.
        label: (n,) int64 class index in the manifest's labels; -1 for a sample without a label.
        key: n keys; sample ids are `manifest.name/key`.
        bad: (kind, shard, key) of samples that could not be used; they are left out of all above.
    """

    image: Tensor
    text: Tensor
    text_owner: Tensor
    label: Tensor
    key: list[str]
    bad: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def first_text(self) -> Tensor | None:
        """(n, Dt): the first caption of every sample; None unless every sample has one."""
        first = torch.ones_like(self.text_owner, dtype=torch.bool)
        first[1:] = self.text_owner[1:] != self.text_owner[:-1]
        return self.text[first] if int(first.sum()) == len(self.key) else None


def class_texts(manifest: Manifest) -> dict[str, Tensor]:
    """Text features of the classes, in the order of `manifest.labels`, not normalised.

    Returns:
        `positive` (C, T, D) and `negative` (C, T', D) float32; of shape (0, 0, 0) where there are none.

    Raises:
        BadInput: if the data set holds no features, or the file is missing, altered, or of other classes.
    """
    towers = of_towers(manifest)
    empty = torch.zeros(0, 0, 0)
    if not towers.get("classes"):
        return {"positive": empty, "negative": empty}
    info = towers["classes"]
    data = read_side_file(manifest.dir, info["file"], HINT)
    digest = hashlib.sha256(data).hexdigest()
    if digest != info["sha256"]:
        raise BadInput(
            f"{manifest.path(info['file'])}: sha256 {digest[:12]}.., {FILE} says {info['sha256'][:12]}... {HINT}."
        )
    tensors = load(data)
    for name, tensor in tensors.items():
        if tensor.dim() != 3 or len(tensor) != len(manifest.labels or []):
            raise BadInput(
                f"{manifest.path(info['file'])}: {name} has the shape {tuple(tensor.shape)}, but there are "
                f"{len(manifest.labels or [])} labels. {HINT}."
            )
    return {name: tensors.get(name, empty).float() for name in ("positive", "negative")}


def read_features(
    manifest: Manifest, split: str, subset: str = "", rank: int = 0, world_size: int = 1
) -> StoredFeatures:
    """This rank's share of the features of a split: consecutive samples, in shares that differ by at most one.

    Args:
        subset: JSON file that names the samples to use, see `data.subset`; empty: all of the split.

    Raises:
        BadInput: if the data set holds no features, there is no such split, or the subset is of another one.
    """
    towers = of_towers(manifest)
    width, views = towers["image_width"], towers.get("views", 0)
    places = _places(manifest, split, subset)
    places = places[rank * len(places) // world_size : (rank + 1) * len(places) // world_size]
    images, texts, owners, labels, keys, bad = [], [], [], [], [], []
    for (shard, _), piece in _pieces(manifest, split, places):
        key = "?"
        try:
            with one_sample():
                if isinstance(piece, BadSample):
                    raise piece
                key, parts = members(piece)
                image, captions, label = _sample(parts, (1 + views, width), towers.get("text_width", 0))
        except BadSample as error:
            file = manifest.shards(split)[shard].file
            log.warning("bad sample %s in %s: %s", key, file, error)
            bad.append((error.kind, file, key))
            continue
        owners += [len(keys)] * len(captions)
        texts += list(captions)
        images.append(image)
        labels.append(label)
        keys.append(key)
    return StoredFeatures(
        image=_stacked(images, (1 + views, width)),
        text=_stacked(texts, (towers.get("text_width", 0),)),
        text_owner=torch.tensor(owners, dtype=torch.int64),
        label=torch.tensor(labels, dtype=torch.int64),
        key=keys,
        bad=bad,
    )


def of_towers(manifest: Manifest) -> dict[str, Any]:
    """`manifest.towers`. Raises BadInput if the data set holds no features."""
    if not manifest.towers:
        raise BadInput(f"{manifest.dir}: holds no features (no `towers` in {FILE}). Make some: launchers/features.py.")
    return manifest.towers


def check_same_towers(manifests: Sequence[Manifest]) -> None:
    """Refuse to mix features of different towers, or features with pixels; no features at all is fine.

    Raises:
        BadInput: naming the first data set that differs from the first, and in what.
    """
    for other in manifests[1:]:
        first = manifests[0]
        if bool(first.towers) != bool(other.towers):
            features, pixels = (first, other) if first.towers else (other, first)
            raise BadInput(
                f"{pixels.dir}: holds no features, but {features.dir} does. Make them with launchers/features.py and "
                "the same towers, or use the data sets that both were made from."
            )
        for name in ("key", "compute", "image_width", "text_width"):
            if first.towers.get(name) != other.towers.get(name):
                raise BadInput(
                    f"{other.dir}: its features were made by other towers than those of {first.dir} ({name} "
                    f"{other.towers.get(name)}, there {first.towers.get(name)}). Make both with the same backbone."
                )


def write_class_texts(dir: Path, name: str, positive: Tensor, negative: Tensor) -> dict[str, str]:
    """Write `NAME.classes.safetensors`; returns its entry `classes` of `Manifest.towers`.

    Args:
        positive, negative: (C, T, D) of the templates and the negated ones, not normalised; stored as float32.
    """
    tensors = {"positive": positive, "negative": negative}
    data = save({name: x.float().contiguous().clone() for name, x in tensors.items()})  # they may be the same tensor
    file = f"{name}.classes.safetensors"
    write_atomic(dir / file, data)
    return {"file": file, "sha256": hashlib.sha256(data).hexdigest()}


def negated(template: str) -> str:
    """A template that denies its class: `no` before the class, in place of an article.

    Source: HeGraphAdapter, arXiv 2410.07854, assumption A-2. The template is edited before the class name is filled
    in, since names may hold the same words.
    """
    return _SLOT.sub("no ", template, count=1)


def class_name_in_words(label: str) -> str:
    """A class name for texts: with spaces for underscores."""
    return label.replace("_", " ")


def _places(manifest: Manifest, split: str, subset: str) -> list[tuple[int, int]]:
    """(shard, sample) of all chosen samples, in order."""
    if subset:
        chosen = Subset.load(subset, manifest, split).places(manifest)
        return [(shard, int(i)) for shard, rows in enumerate(chosen) for i in rows]
    return [(shard, i) for shard, info in enumerate(manifest.shards(split)) for i in range(info.samples)]


def _pieces(
    manifest: Manifest, split: str, places: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], bytes | BadSample]]:
    reader = ShardReader(manifest, split)
    try:
        for first in range(0, len(places), CHUNK):
            wanted = places[first : first + CHUNK]
            yield from zip(wanted, reader.read(wanted), strict=True)
    finally:
        reader.close()


def _sample(parts: dict[str, bytes], shape: tuple[int, int], text_width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(1 + V, Dv), (n, Dt) and the class index of one sample. Raises BadSample."""
    if "npy" not in parts:
        raise BadSample("field", "no features")
    image = _array(parts["npy"])
    image = image[0] if image.ndim == 3 and len(image) else image
    if image.shape != shape:
        raise BadSample("features", f"shape {image.shape} instead of {shape}")
    captions = _array(parts["text.npy"]) if "text.npy" in parts else np.zeros((0, text_width), np.float32)
    if captions.ndim != 2 or captions.shape[1] != text_width:
        raise BadSample("features", f"captions of shape {captions.shape} instead of (n, {text_width})")
    label = record_of(parts).get("label", -1)
    return image, captions, label if isinstance(label, int) else -1


def _array(data: bytes) -> np.ndarray:
    return npy_array(data).astype(np.float32)  # not finite: one in the bank would spoil every prediction


def _stacked(rows: Iterable[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    rows = list(rows)
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, *shape)
