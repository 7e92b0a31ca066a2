"""`--resize`: pictures are stored smaller by one rule, stated with its loss, and the same bytes every time."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep import prepare
from data_prep.common import resize
from mmpeft_ds.data import decode
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput


def picture(mode="RGB", size=(60, 40), form="JPEG", **options):
    """A smooth picture, so that JPEG loses little."""
    across = np.linspace(0, 255, size[0])[None, :, None] * np.ones((size[1], 1, 3))
    buffer = io.BytesIO()
    image = Image.fromarray(across.astype(np.uint8)).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("mode", "form", "ending"),
    [
        ("RGB", "JPEG", "jpg"),
        ("CMYK", "JPEG", "jpg"),
        ("L", "JPEG", "jpg"),
        ("RGB", "MPO", "jpg"),
        ("RGB", "WEBP", "webp"),
        ("P", "PNG", "png"),
        ("RGBA", "PNG", "png"),
        ("LA", "PNG", "png"),
        ("P", "GIF", "png"),
        ("RGB", "BMP", "png"),
        ("RGB", "TIFF", "png"),
    ],
)
def test_whatever_a_picture_is_it_is_stored_in_colour_with_the_shorter_side(mode, form, ending):
    stored, data = resize.smaller(picture(mode, form=form), resize.Resize(20))
    assert (
        stored == ending and opened(data).mode == ("RGBA" if "A" in mode else "RGB") and opened(data).size == (30, 20)
    )
    row = np.asarray(opened(data).convert("RGB"))[10, :, 0].astype(int)
    assert row[0] < 40 and row[-1] > 215 and (np.diff(row) > -9).all()


def test_a_picture_that_is_small_enough_keeps_its_bytes():
    assert resize.smaller(picture(size=(60, 20)), resize.Resize(20)) is None
    assert resize.smaller(picture(size=(60, 21)), resize.Resize(20)) is not None


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("pixels", ["shown", "published"])
def test_a_turned_picture_is_read_as_the_whole_one_would_be(form, pixels):
    """A phone's pictures lost their orientation, and with it what is up, where they were larger than SIDE."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = picture(form=form, exif=exif)
    _, data = resize.smaller(whole, resize.Resize(20))
    wanted = decode.resize(decode.decode(whole, pixels=pixels), 20)
    read = decode.decode(data, pixels=pixels)
    assert read.shape == wanted.shape == ((3, 30, 20) if pixels == "shown" else (3, 20, 30))
    assert (read.int() - wanted.int()).abs().float().mean() < 4


def test_a_picture_that_is_not_turned_gets_no_exif():
    _, data = resize.smaller(picture(), resize.Resize(20))
    assert b"Exif" not in data


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparency_and_the_colour_below_it_stay(form):
    buffer = io.BytesIO()
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    Image.new("RGBA", (40, 40), (200, 10, 10, 0)).save(buffer, form, **options)
    _, data = resize.smaller(buffer.getvalue(), resize.Resize(8))
    assert decode.decode(data)[:, 4, 4].tolist() == [255, 255, 255]
    assert decode.decode(data, pixels="published")[:, 4, 4].tolist() == pytest.approx([200, 10, 10], abs=6)


def test_sixteen_bits_stay():
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 40), 20_000, dtype=np.uint16)).save(buffer, "PNG")
    assert resize.smaller(buffer.getvalue(), resize.Resize(8)) is None


def test_the_error_is_that_of_encoding_and_grows_with_less_quality():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    png = buffer.getvalue()
    assert resize.squared_error(png, resize.smaller(png, resize.Resize(32))[1], 32) == 0
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=95)
    errors = [
        resize.squared_error(buffer.getvalue(), resize.smaller(buffer.getvalue(), resize.Resize(32, q))[1], 32)
        for q in (95, 75, 30)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        path = tmp_path / "photos" / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(size=(60 + i, 40 if i else 16)))
    (tmp_path / "photos" / "a" / "broken.jpg").write_bytes(picture()[:300])
    return tmp_path / "photos"


def prepared(folder, out, *options):
    prepare.main(["image-folder", "--folder", str(folder), "--out", str(out), "--samples-per-shard", "5", *options])
    return Manifest.load(out)


def test_the_manifest_states_what_was_done_and_two_runs_give_the_same_bytes(folder, tmp_path, capsys):
    one = prepared(folder, tmp_path / "one", "--resize", "20", "--processes", "1")
    prepared(folder, tmp_path / "two", "--resize", "20", "--processes", "2")
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }
    stated = one.source["resize"]
    # One picture is small enough, one cannot be decoded.
    assert (stated["side"], stated["quality"], stated["filter"]) == (20, 90, "bicubic")
    assert (stated["resized"], stated["kept"], stated["psnr"]["pictures"]) == (11, 2, 11)
    assert stated["psnr"]["all"] >= stated["psnr"]["worst"] > 30
    assert "11 pictures resized (shorter side 20, bicubic, quality 90), 2 kept" in capsys.readouterr().out
    prepared(folder, tmp_path / "one", "--resize", "20")
    assert (
        "11 pictures resized (shorter side 20, bicubic, quality 90), 2 kept" in capsys.readouterr().out
    )  # already prepared


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (["--resize", "20"], ["--resize", "30"], "resize 20, now 30"),
        (["--resize", "20"], [], "resize 20, now 0"),
        ([], ["--resize", "20"], "resize None, now 20"),
        (["--resize", "20"], ["--resize", "20", "--quality", "50"], "quality 90, now 50"),
    ],
)
def test_another_size_is_refused(folder, tmp_path, before, after, says):
    prepared(folder, tmp_path / "out", *before)
    with pytest.raises(BadInput, match=f"{says}.*--overwrite"):
        prepared(folder, tmp_path / "out", *after)
    prepared(folder, tmp_path / "out", *after, "--overwrite")


@pytest.mark.parametrize("options", [["--resize", "-3"], ["--resize", "9", "--quality", "0"]])
def test_a_wrong_size_or_quality_is_one_line(folder, tmp_path, options):
    with pytest.raises(BadInput, match=r"^--(resize|quality): .*\. Use "):
        prepared(folder, tmp_path / "out", *options)


def test_the_sample_is_about_64_pictures_whatever_their_number():
    assert resize.Resize(9).measured_on(10).share == 1
    assert resize.Resize(9).measured_on(6400).share == 0.01
