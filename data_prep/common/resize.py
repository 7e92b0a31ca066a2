"""`--resize SIDE`: pictures whose shorter side is longer are stored smaller, as training would make them.

The rule, for every source. The first picture of a file is converted to RGB by Pillow: CMYK, palette and gray as
`convert("RGB")` gives them. The shorter side becomes SIDE, the longer one keeps the ratio, by Pillow's antialiased
bicubic filter. EXIF orientation is kept beside the pixels, and transparency too, so that both kinds of `data.pixels`
read what they would have read of the whole picture. JPEG stays JPEG and WebP stays WebP, of quality Q; PNG, BMP, GIF
and TIFF become PNG. A picture that is small enough, has 16 bits, or cannot be decoded, keeps its bytes. Large JPEG
files are decoded at a fraction that is still twice as large as what is stored.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from data_prep.sources.base import RawSample
from mmpeft_ds.data.formats import FORMATS, MAX_PIXELS, ORIENTATION
from mmpeft_ds.data.parts import Part
from mmpeft_ds.errors import BadInput

SAMPLE = 64  # pictures that are compared with resizing at run time, about
QUALITY = 90
FILTER = "bicubic"
_LOSSY = {"JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}


@dataclass(frozen=True)
class Resize:
    """Settings of stored pictures.

    Attributes:
        side: length of the shorter side in pixels, of pictures that are larger.
        quality: of JPEG and WebP, 1 to 95.
        share: of pictures, chosen by the hash of their bytes, that are compared with resizing at run time.
    """

    side: int
    quality: int = QUALITY
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.side < 1:
            raise BadInput(f"--resize: {self.side}. Use the wanted length of the shorter side in pixels.")
        if not 1 <= self.quality <= 95:
            raise BadInput(f"--quality: {self.quality}. Use a number from 1 to 95, for example {QUALITY}.")

    def measured_on(self, pictures: int) -> Resize:
        """The same where the sample is to be taken from so many pictures."""
        return replace(self, share=min(1.0, SAMPLE / max(pictures, 1)))


class Resizer:
    """Resizes the pictures of the samples of one shard, and counts.

    Args:
        how: the rule.
    """

    def __init__(self, how: Resize):
        self.how = how
        self.resized = self.kept = 0
        self.errors: list[float] = []  # mean squared errors of the measured pictures

    def samples(self, samples: Iterable[RawSample]) -> Iterator[RawSample]:
        """The samples with their pictures as they are stored."""
        for sample in samples:
            images = [self._stored(ending, data) for ending, data in sample.images]
            yield replace(sample, images=images)

    def numbers(self) -> dict[str, np.ndarray]:
        """Counts for the part of the shard: `resized`, (resized, kept as they were), and `squared_errors`."""
        return {
            "resized": np.array([self.resized, self.kept]),
            "squared_errors": np.array(self.errors, dtype=np.float64),
        }

    def _stored(self, ending: str, data: bytes) -> tuple[str, bytes]:
        try:
            made = smaller(data, self.how)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            made = None  # training counts it as a bad sample, by the same bytes
        if made is None:
            self.kept += 1
            return ending, data
        self.resized += 1
        if xxhash.xxh3_64_intdigest(data) < self.how.share * 2**64:
            self.errors.append(squared_error(data, made[1], self.how.side))
        return made


def smaller(data: bytes, how: Resize) -> tuple[str, bytes] | None:
    """(ending, bytes) of a picture by the rule above; None if it keeps its bytes. Errors are those of Pillow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) <= how.side or image.mode.startswith(("I", "F")):
                return None
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels")
            size = size_of(width, height, how.side)
            image.draft("RGB", (2 * size[0], 2 * size[1]))
            pixels = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            if image.has_transparency_data:  # apart from the colours, which stay as they are below it
                alpha = image.convert("RGBA").getchannel("A")
                pixels.putalpha(alpha.resize(size, Image.Resampling.BICUBIC))
            kind = image.format or ""
            exif = b""
            if (orientation := image.getexif().get(ORIENTATION, 1)) != 1:
                tags = Image.Exif()
                tags[ORIENTATION] = orientation
                exif = tags.tobytes()
    buffer = io.BytesIO()
    if kind == "WEBP":
        pixels.save(buffer, "WEBP", quality=how.quality, exact=True, exif=exif)
    elif kind in _LOSSY:
        pixels.save(buffer, "JPEG", quality=how.quality, exif=exif)
    else:
        pixels.save(buffer, "PNG", exif=exif)
    return _LOSSY.get(kind, "png"), buffer.getvalue()


def size_of(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) with the shorter side of length `side`."""
    short = min(width, height)
    return max(side, round(width * side / short)), max(side, round(height * side / short))


def squared_error(data: bytes, stored: bytes, side: int) -> float:
    """Mean squared error, of values of 0 to 255, of a stored picture against the whole one resized at run time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as whole, Image.open(io.BytesIO(stored)) as small:
            wanted = whole.convert("RGB").resize(size_of(*whole.size, side), Image.Resampling.BICUBIC)
            difference = np.asarray(wanted, dtype=np.float32) - np.asarray(small.convert("RGB"), dtype=np.float32)
    return float(np.square(difference).mean())


def described(how: Resize, parts: Iterable[Part]) -> dict[str, Any]:
    """Entry for the manifest: side, quality, filter, numbers of pictures that were resized and kept, and the PSNR in
    dB of the sample against resizing at run time, over all its pixels and of its worst picture; None where nothing was
    lost."""
    resized = kept = 0
    errors: list[float] = []
    for part in parts:
        arrays = part.arrays()
        resized, kept = resized + int(arrays["resized"][0]), kept + int(arrays["resized"][1])
        errors += arrays["squared_errors"].tolist()
    return {
        "side": how.side,
        "quality": how.quality,
        "filter": FILTER,
        "resized": resized,
        "kept": kept,
        "psnr": {
            "pictures": len(errors),
            "all": _decibels(math.fsum(errors) / len(errors) if errors else 0),
            "worst": _decibels(max(errors, default=0)),
        },
    }


def line(stated: dict[str, Any]) -> str:
    """One line for prepare.py to print, from the entry of `described`."""
    psnr = stated["psnr"]
    quality = "nothing was lost" if psnr["all"] is None else f"PSNR {psnr['all']:.1f} dB, worst {psnr['worst']:.1f} dB"
    how = f"shorter side {stated['side']}, {stated['filter']}, quality {stated['quality']}"
    return (
        f"{stated['resized']:,} pictures resized ({how}), {stated['kept']:,} kept as they are; {psnr['pictures']} of "
        f"them against resizing at run time: {quality}"
    )


def _decibels(error: float) -> float | None:
    return round(10 * math.log10(255**2 / error), 2) if error else None
