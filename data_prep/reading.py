"""Read single samples of prepared shards, for verify.py and show.py."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmpeft_ds.data.formats import FORMATS, STORED
from mmpeft_ds.data.shards import members
from mmpeft_ds.errors import BadSample


@dataclass
class StoredSample:
    """One sample as it lies in a shard: its key, its images as encoded bytes in order, its json, its features."""

    key: str
    images: list[bytes]
    record: dict[str, Any]
    features: np.ndarray | None = None


def parse_sample(piece: bytes) -> StoredSample:
    """The one sample in a piece of tar. Raises BadSample if it cannot be used."""
    key, parts = members(piece)
    if "json" not in parts:
        raise BadSample("json", "none")
    try:
        record = json.loads(parts["json"])
    except ValueError as error:
        raise BadSample("json", str(error)) from error
    if not isinstance(record, dict):
        raise BadSample("json", f"{type(record).__name__} instead of an object")
    features = None
    if "npy" in parts:
        try:
            features = np.load(io.BytesIO(parts["npy"]), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadSample("npy", str(error)) from error
    return StoredSample(key, [data for _, data in sorted(_images(parts))], record, features)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header. Raises BadSample if it is no image that training reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images: the limit that counts is the recipe's
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise BadSample("pixels", str(error)) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample("image", "not an image of a known format") from error


def _images(parts: dict[str, bytes]) -> list[tuple[int, bytes]]:
    """(position, bytes) of the images: `jpg` is the only one, `0.jpg`, `1.jpg`, ... are several."""
    images = []
    for extension, data in parts.items():
        number, _, kind = extension.rpartition(".")
        if kind in STORED.values() and (number == "" or number.isdigit()):
            images.append((int(number or 0), data))
    return images
