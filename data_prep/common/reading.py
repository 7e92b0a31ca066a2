"""Read single samples of prepared shards, for verify.py and show.py, and headers of pictures."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmpeft_ds.data.formats import FORMATS, MAX_PIXELS, check_aspect, check_pixels
from mmpeft_ds.data.parsing import npy_array
from mmpeft_ds.data.shards import image_names, members, record_of
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
    record = record_of(parts)
    arrays = {name: npy_array(data) for name, data in parts.items() if name == "npy" or name.endswith(".npy")}
    features = arrays.get("npy")
    return StoredSample(key, [parts[name] for name in image_names(parts)], record, features)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header. Raises BadSample if it is no image that training reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images: the limit that counts is the recipe's
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise BadSample("pixels", str(error)) from error
    except Exception as error:  # noqa: BLE001 - Pillow's plugins raise nearly anything on damaged input
        raise BadSample("image", "not an image of a known format") from error


def check_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Raises BadSample if the header shows that training cannot use a picture; the pixels are not read."""
    width, height = image_size(data)
    check_pixels(width, height, max_pixels)
    check_aspect(height, width)
