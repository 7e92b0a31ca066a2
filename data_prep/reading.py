"""Read single samples of prepared shards, for verify.py and show.py."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from mmpeft_ds.data.writer import IMAGE_EXTENSIONS


@dataclass
class StoredSample:
    """One sample as it lies in a shard: its key, its images as encoded bytes in order, its json, its features."""

    key: str
    images: list[bytes]
    record: dict[str, Any]
    features: np.ndarray | None = None


def read_sample(stream: BinaryIO, begin: int, length: int) -> StoredSample:
    """The sample at `begin` of a tar. Raises ValueError in a few words if it cannot be used."""
    stream.seek(begin)
    try:
        with tarfile.open(fileobj=io.BytesIO(stream.read(length)), mode="r:") as archive:
            files = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"is no piece of a tar ({error})") from error
    keys = {name.split(".", 1)[0] for name in files}
    if len(keys) != 1:
        raise ValueError(f"the index points at {len(keys)} keys instead of one")
    key = keys.pop()
    parts = {name.split(".", 1)[1]: data for name, data in files.items()}
    try:
        record = json.loads(parts["json"])
    except KeyError as error:
        raise ValueError("has no json") from error
    except ValueError as error:
        raise ValueError(f"its json does not parse ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("its json is no object")
    features = np.load(io.BytesIO(parts["npy"]), allow_pickle=False) if "npy" in parts else None
    return StoredSample(key, [data for _, data in sorted(_images(parts))], record, features)


def check_image(data: bytes) -> tuple[int, int]:
    """(width, height) from the header. Raises ValueError if it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError("holds something that is no image") from error


def _images(parts: dict[str, bytes]) -> list[tuple[int, bytes]]:
    """(position, bytes) of the images: `jpg` is the only one, `0.jpg`, `1.jpg`, ... are several."""
    found = []
    for extension, data in parts.items():
        number, _, kind = extension.rpartition(".")
        if kind in IMAGE_EXTENSIONS and (number == "" or number.isdigit()):
            found.append((int(number or 0), data))
    return found
