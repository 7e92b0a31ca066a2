"""Pictures as data sets publish them: what a file holds whatever its ending says, and whether it is whole.

Endings lie in many data sets (specs/datasets.md, section 1). Bytes are stored as they are; what they hold decides
under which ending. CMYK, palette, gray, 16-bit and alpha are left to decoding, which ends in RGB as the published code
does.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from mmpeft_ds.data.formats import FORMATS

HEAD = 16  # bytes that tell the format
SHORT_TAIL = 64  # bytes at the end in which the last marker stands in nearly every file
TAIL = 65536  # in which it must stand: some files have bytes after it
SEGMENTS = 2048  # bytes read at a time of the segments before the scan of a JPEG


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


def whole_file(path: str | Path) -> bytes:
    """The bytes of a file, as `Path.read_bytes` gives them in twice the time."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        data = os.read(file, size + 1)
        if len(data) == size:  # one byte less than was asked for
            return data
        parts = [data]
        while parts[-1]:  # until its end: it has grown, or the read gave less than there is
            parts.append(os.read(file, TAIL))
    finally:
        os.close(file)
    return b"".join(parts)


def problem(path: str | Path) -> str:
    """Reason why the file of a picture cannot be used (missing, empty, not a picture, cut off); nothing if it looks
    whole.

    JPEG, PNG and WebP, which most sets consist of, take a few reads of some bytes and no decoding. Only where bytes
    follow the last marker, more of the end is read. The other formats are decoded.
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
    head = os.pread(file, SEGMENTS, 0)
    if not head:
        return "empty picture"
    kind = ending_by_content(head)
    if kind is None:
        return "not a picture"
    size = os.fstat(file).st_size
    if kind == "jpg":
        whole = _scan(file, size, head) < _last(file, size, b"\xff\xd9")
    elif kind == "png":
        whole = _last(file, size, b"IEND") >= 0
    elif kind == "webp":
        whole = int.from_bytes(head[4:8], "little") + 8 <= size
    else:
        whole = _decodes(file)
    return "" if whole else "picture cut off"


def _last(file: int, size: int, mark: bytes) -> int:
    """Position of the last occurrence of a marker at the end of a file, -1 if there is none."""
    for tail in (SHORT_TAIL, TAIL):
        begin = max(size - tail, 0)
        if (at := os.pread(file, tail, begin).rfind(mark)) >= 0:
            return begin + at
    return -1


def _scan(file: int, size: int, head: bytes) -> int:
    """Start of the first scan of a JPEG, since an end marker before it belongs to a thumbnail. The size of the file if
    there is none."""
    first, data, at = 0, head, 2  # `data` stands at `first` in the file, and `at` counts from there
    while first + at < size:
        if at + 4 > len(data):
            first, data, at = first + at, os.pread(file, SEGMENTS, first + at), 0
            if len(data) < 4:
                break
        if data[at] != 0xFF:
            break
        if (kind := data[at + 1]) == 0xDA:
            return first + at
        # Bytes that fill up stand before a marker, one at a time; other segments say their length.
        at += 1 if kind == 0xFF else 2 + (data[at + 2] << 8) + data[at + 3]
    return size


def _decodes(file: int) -> bool:
    """By Pillow, as training decodes: what says how long a GIF, BMP or TIFF is differs from writer to writer."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), os.fdopen(file, "rb", closefd=False) as stream:
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=FORMATS) as image:
                image.load()
    except Image.DecompressionBombError:
        return True  # whole, and for the recipe to refuse
    except (OSError, ValueError, SyntaxError, EOFError):
        return False
    return True
