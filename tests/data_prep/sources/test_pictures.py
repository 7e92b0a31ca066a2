"""Which picture files are whole, of every format that data sets publish, whatever writers put before and after."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.common.pictures import problem

PIXELS = np.random.default_rng(0).integers(0, 255, (120, 120, 3)).astype(np.uint8)


def encoded(form, mode="RGB", side=120, **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[:side, :side]).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


THUMBNAIL = b"Exif\0\0" + encoded("JPEG", side=32)  # ends in a marker of its own
FILES = {
    "jpeg": encoded("JPEG"),
    "jpeg with a thumbnail": encoded("JPEG", exif=THUMBNAIL),
    "progressive": encoded("JPEG", progressive=True),
    "cmyk": encoded("JPEG", "CMYK"),
    "mpo": encoded("MPO", save_all=True, append_images=[Image.fromarray(PIXELS)]),
    "png": encoded("PNG", "RGBA"),
    "palette": encoded("PNG", "P"),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "webp": encoded("WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_whole_picture_passes_with_bytes_after_it_and_one_that_is_cut_does_not(name, tmp_path):
    path = tmp_path / "a.jpg"  # the ending says nothing
    for whole in (FILES[name], FILES[name] + bytes(100)):
        path.write_bytes(whole)
        assert problem(path) == ""
    for share in (0.1, 0.4):
        path.write_bytes(FILES[name][: int(len(FILES[name]) * share)])
        assert problem(path) == "picture cut off"


def test_other_files_are_no_pictures(tmp_path):
    said = {}
    for name, data in (("empty", b""), ("page", b"<html>not found</html>"), ("start", b"\xff\xd8\xff")):
        (tmp_path / name).write_bytes(data)
        said[name] = problem(tmp_path / name)
    assert said == {"empty": "empty picture", "page": "not a picture", "start": "picture cut off"}
    assert problem(tmp_path / "none") == "picture missing"
