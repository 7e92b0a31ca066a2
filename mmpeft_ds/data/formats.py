"""Image formats: the endings of picture files, what shards store, and the decoders that may read foreign files."""

from __future__ import annotations

# Ending of a picture file -> ending of its name in a shard; other endings are not stored.
STORED = {
    "jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp", "bmp": "bmp", "gif": "gif", "tif": "tif", "tiff": "tif",
}  # fmt: skip
# Endings of names in shards, and of picture files, that are read as images.
READ = (*STORED, "ppm")
# Plugins of Pillow that may parse what comes from outside; Pillow knows many more.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 89_478_485
# As `Path.suffix` gives the endings.
STORED_SUFFIXES = tuple(f".{ending}" for ending in STORED)
READ_SUFFIXES = tuple(f".{ending}" for ending in READ)
