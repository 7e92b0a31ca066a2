"""One sample of a feature shard: as it is written, and back from its bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg
from torch import Tensor

from mmpeft_ds.data.decode import resize
from mmpeft_ds.data.parsing import npy_array
from mmpeft_ds.data.shards import image_names, members, record_of

QUALITY = 85


@dataclass
class FeatureSample:
    """One sample, as `data.writer` takes it.

    Attributes:
        name: the source's own name of it.
        features: (1 + V, Dv), or (k, 1 + V, Dv) of k > 1 images; None without an image.
        arrays: `text`, (n, Dt) of n captions, where there are any.
        images: (extension, encoded bytes) of thumbnails.
        record: the json of the source.
    """

    name: str
    features: np.ndarray | None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    images: list[tuple[str, bytes]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


def stored_sample(piece: bytes) -> FeatureSample:
    """The sample of a piece of a tar that we wrote; written again it gives the same bytes."""
    _, parts = members(piece)
    record = record_of(parts)
    arrays = {n.removesuffix("npy").rstrip("."): npy_array(data) for n, data in parts.items() if n.endswith("npy")}
    features = arrays.pop("", None)
    images = [(name.rpartition(".")[2], parts[name]) for name in image_names(parts)]
    return FeatureSample(record.pop("source_name"), features, arrays, images, record)


def thumbnail(image: Tensor, side: int) -> bytes:
    """A JPEG of a uint8 (3, H, W) picture whose longer side has at most `side` pixels."""
    height, width = image.shape[-2:]
    scale = min(1.0, side / max(height, width))
    small = resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    pixels = np.ascontiguousarray(small.permute(1, 2, 0).numpy())
    return simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorspace="RGB")
