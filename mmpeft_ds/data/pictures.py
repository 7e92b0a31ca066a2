"""An encoded picture as a viewer shows it, by Pillow alone: turned as EXIF says, transparency on white, 8 bits."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from mmpeft_ds.data.formats import FORMATS
from mmpeft_ds.errors import BadSample


def shown(data: bytes) -> Image.Image:
    """The picture in RGB. Raises BadSample if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's plugins raise nearly anything on damaged input
        raise BadSample("image", f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """In RGB: 16 bits reduced to 8, transparency on white. Raises BadSample for floating-point pixels."""
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion would clip everything above 255 to white.
        return Image.fromarray((np.array(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadSample("image", "floating-point pixels have no known range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
