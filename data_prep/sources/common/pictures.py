"""Pictures as data sets publish them: what a file holds whatever its ending says, and whether it is whole.

Endings lie in many data sets (specs/datasets.md, section 1). Bytes are stored as they are; what they hold decides
under which ending. CMYK, palette, gray, 16-bit and alpha are left to decoding, which ends in RGB as the published code
does.
"""

from __future__ import annotations

import os
from pathlib import Path

HEAD = 16  # bytes that tell the format
SHORT_TAIL = 64  # bytes at the end in which the last marker stands in nearly every file
TAIL = 65536  # in which it must stand: some files have bytes after it
_ENDS = {"jpg": b"\xff\xd9", "png": b"IEND"}


def ending_by_content(head: bytes) -> str | None:
    """`jpg`, `png`, `gif`, `bmp`, `webp` or `tif` by the first bytes of a file; None for anything else."""
    if head[:3] == b"\xff\xd8\xff":
        return "jpg"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:2] == b"BM":
        return "bmp"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:4] in (b"II*\x00", b"MM\x00*"):
        return "tif"
    return None


def problem(path: Path) -> str:
    """Why the file of a picture cannot be used (missing, empty, not a picture, cut off); nothing if it looks whole.

    Two reads of a few bytes, no decoding. Only where bytes follow the last marker, more of the end is read.
    """
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            return _problem(file)
        finally:
            os.close(file)
    except FileNotFoundError:
        return "picture missing"
    except OSError as error:
        return f"picture cannot be read ({error.strerror})"


def _problem(file: int) -> str:
    head = os.pread(file, HEAD, 0)
    if not head:
        return "empty picture"
    kind = ending_by_content(head)
    if kind is None:
        return "not a picture"
    if kind in _ENDS:
        size = os.fstat(file).st_size
        if not any(_ENDS[kind] in os.pread(file, tail, max(size - tail, 0)) for tail in (SHORT_TAIL, TAIL)):
            return "picture cut off"
    return ""
