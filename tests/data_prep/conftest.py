"""Small sources for the scripts of data_prep."""

import json

import pytest

from tests.helpers.data.images import picture


@pytest.fixture
def image_folder(tmp_path):
    """24 images of two classes whose names hold dots and capitals, in `tmp_path`/photos."""
    for name in ("Cat.v1", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            suffix, form = (".JPG", "JPEG") if i % 2 else (".png", "PNG")
            path = tmp_path / "photos" / name / f"a.b.{i:02d}{suffix}"
            path.write_bytes(picture((10 * i, 255 if name == "dog" else 0, 9), form))
    return tmp_path / "photos"


@pytest.fixture
def jsonl(tmp_path):
    """Writes lines (objects, or raw bytes) to a file beside the images `0.png` ... `5.png`; returns its path."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(picture((40 * i, 0, 0)))

    def write(*lines, name="train.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return path

    return write
