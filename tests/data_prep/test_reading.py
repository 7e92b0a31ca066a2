"""The size of a picture from its header: whatever the short reading accepts, Pillow accepts with the same size."""

import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from data_prep.common import reading
from mmpeft_ds.data.formats import FORMATS
from mmpeft_ds.errors import BadSample

PIXELS = np.random.default_rng(0).integers(0, 255, (31, 47, 3), dtype=np.uint8)


def encoded(form, mode, **options):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(stream, form, **options)
    return stream.getvalue()


USUAL = [
    encoded("JPEG", mode, **options)
    for mode in ("RGB", "L", "CMYK")
    for options in ({}, {"progressive": True}, {"optimize": True}, {"comment": b"a comment"}, {"exif": Image.Exif()})
]
USUAL += [encoded("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA")]
OTHERS = [encoded("PNG", "P"), encoded("PNG", "RGB", dpi=(72, 72)), encoded("JPEG", "RGB", icc_profile=b"x" * 40)]
OTHERS += [encoded("GIF", "P"), encoded("WEBP", "RGB"), encoded("BMP", "RGB")]


def by_pillow(data):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.size
    except Exception:  # noqa: BLE001 - whatever it is, it is no picture
        return None


def test_usual_pictures_are_read_without_pillow_and_others_with_it(monkeypatch):
    assert [reading.image_size(data) for data in (*USUAL, *OTHERS)] == [(47, 31)] * len(USUAL + OTHERS)
    monkeypatch.setattr(reading.Image, "open", lambda *_, **__: 1 / 0)
    assert [reading.image_size(data) for data in USUAL] == [(47, 31)] * len(USUAL)
    for data in OTHERS:
        with pytest.raises(BadSample):
            reading.image_size(data)


def damaged(data, draw):
    """`data` with a few bytes of its header changed, left out or put in, or cut off."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(data), 700))
        kind = draw.randrange(4)
        if kind == 0:
            data[at] = draw.choice((0, 3, 8, 0xC0, 0xDA, 0xDB, 0xE0, 0xE1, 0xEE, 0xFF, draw.randrange(256)))
        elif kind == 1:
            del data[at + 1 : at + draw.randint(2, 20)]
        elif kind == 2:
            data[at:at] = draw.randbytes(draw.randint(1, 12))
        else:
            del data[max(at, 1) :]
    return bytes(data)


def test_no_damaged_header_passes_that_pillow_refuses_or_reads_as_another_size():
    draw, passed, refused = random.Random(0), 0, 0
    for _ in range(4000):
        data = damaged(draw.choice(USUAL), draw)
        size, expected = reading._plain_size(data), by_pillow(data)
        assert size in (None, expected), data[:80]
        passed, refused = passed + (size is not None), refused + (expected is None)
    assert passed > 1000 and refused > 1000, "neither of them is tried"


def test_more_pixels_than_are_read_are_refused_whatever_reads_the_header():
    data = bytearray(encoded("JPEG", "RGB"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(BadSample) as bad:
        reading.check_picture(bytes(data))
    assert bad.value.kind == "pixels"
    data[at + 5 : at + 9] = b"\x00\x00\x00\x09"
    with pytest.raises(BadSample) as bad:
        reading.check_picture(bytes(data))
    assert bad.value.kind == "image"
