"""Read single samples of prepared shards, for verify.py and show.py, and headers of pictures."""

from __future__ import annotations

import io
import warnings
import zlib
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
    if (size := _plain_size(data)) is not None:
        return size
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


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the usual JPEG and PNG, in a tenth of the time that Pillow takes; None for all others, and
    for whatever Pillow might refuse."""
    if data[:3] == b"\xff\xd8\xff":
        size = _jpeg_size(data)
    else:
        # Of chunks between the header and the pixels some would end Pillow's reading.
        usual = data[:16] == _PNG_HEAD and data[24:29] in _PNG_FORMS and data[37:41] == b"IDAT"
        whole = usual and zlib.crc32(data[12:29]) == int.from_bytes(data[29:33], "big")
        size = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) if whole else None
    return size if size and 0 < size[0] * size[1] <= MAX_PIXELS else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    size, at, end = None, 2, len(data) - 12
    while at < end and data[at] == 0xFF:
        kind, length = data[at + 1], (data[at + 2] << 8) + data[at + 3]
        if kind == 0xDA:  # what is compressed follows
            return size if 2 <= length <= len(data) - at - 2 else None
        if kind in _FRAMES:
            if size or data[at + 4] != 8 or (length, data[at + 9]) not in _COMPONENTS:
                return None
            size = (data[at + 7] << 8) + data[at + 8], (data[at + 5] << 8) + data[at + 6]
        elif kind == 0xDB:  # one table of bytes, or two
            if data[at + 4] > 15 or not (length == 67 or length == 132 and at + 69 < end and data[at + 69] < 16):
                return None
        elif length < _SHORTEST.get(kind, 1 << 16):
            return None
        at += 2 + length
    return None


_PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
# Bit depth, colour, compression, filter and interlace.
_PNG_FORMS = {bytes((8, colour, 0, 0, interlaced)) for colour in (0, 2, 4, 6) for interlaced in (0, 1)}
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
_COMPONENTS = {(11, 1), (17, 3), (20, 4)}  # length of a frame's header, number of components
# Segments that are passed over, and how long Pillow wants them: tables, restarts, JFIF, EXIF, Adobe, comments.
_SHORTEST = {0xC4: 2, 0xDD: 2, 0xE0: 9, 0xE1: 2, 0xEE: 9, 0xFE: 2}
