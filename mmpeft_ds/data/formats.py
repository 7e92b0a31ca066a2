"""Formats of images and features: endings of picture files, what shards store, the decoders of foreign files."""

from __future__ import annotations

from mmpeft_ds.errors import BadSample

# Ending of a picture file -> ending of its name in a shard; other endings are not stored.
STORED = {
    "jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp", "bmp": "bmp", "gif": "gif", "tif": "tif", "tiff": "tif",
}  # fmt: skip
# Endings of names in shards, and of picture files, that are read as images.
READ = (*STORED, "ppm")
# Plugins of Pillow that may parse what comes from outside; Pillow knows many more.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 89_478_485
ORIENTATION = 0x0112  # EXIF's tag of how a stored picture is to be turned
MAX_SAMPLE_BYTES = 2**30
# As `Path.suffix` gives the endings.
STORED_SUFFIXES = tuple(f".{ending}" for ending in STORED)
READ_SUFFIXES = tuple(f".{ending}" for ending in READ)
# The longer side of a picture over the shorter one, at most. Processors scale the shorter side up before they cut out
# the centre, so a strip of a few kilobytes would fill the memory; Qwen2-VL's refuses more as well.
MAX_ASPECT = 200
# Regions of a picture as they are stored for published models: the best 36, or up to 100. Both are also whole grids.
REGION_COUNTS = (36, 100)


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises BadSample for a picture of more than `max_pixels`."""
    if width * height > max_pixels:
        raise BadSample("pixels", f"{width}x{height} exceeds {max_pixels} pixels")


def check_aspect(height: int, width: int) -> None:
    """Raises BadSample for a picture with a side of 0, or more than MAX_ASPECT times as long as wide."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadSample("aspect", f"{width} x {height} pixels, more than {MAX_ASPECT} times as long as wide")
