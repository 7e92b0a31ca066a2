"""Encoded images become upright 8-bit RGB, whatever they were, or bad samples."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from mmpeft_ds.data.decode import center_crop, decode, resize, size_of
from mmpeft_ds.errors import BadSample
from tests.helpers.data.images import encoded, photo


def saved(image, kind="PNG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def psnr(a, b) -> float:
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return 10 * np.log10(255**2 / (difference**2).mean())


def hwc(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("quality", [60, 90, 100])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_and_resize_match_pillow_above_60_decibel(quality, subsampling):
    for seed in range(3):
        data = saved(photo(seed, 480, 640), "JPEG", quality=quality, subsampling=subsampling)
        image = decode(data)
        assert image.dtype == torch.uint8 and image.shape == (3, 480, 640)
        small = resize(image, (224, 224))
        with Image.open(io.BytesIO(data)) as reference:
            assert psnr(hwc(small), reference.resize((224, 224), Image.BICUBIC)) > 60


def test_the_decibel_check_notices_another_filter():
    data = saved(photo(0, 480, 640), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as reference:
        assert (
            psnr(hwc(resize(decode(data), (224, 224), "bilinear")), reference.resize((224, 224), Image.BICUBIC)) < 60
        )


def test_scaled_decoding_keeps_the_size_that_is_needed():
    data = saved(photo(0, 480, 640), "JPEG", quality=90)
    scaled = decode(data, min_size=(224, 224))
    assert scaled.shape == (3, 240, 320)
    # Not twice as large: full size rather than too small.
    assert decode(data, min_size=(300, 300)).shape == (3, 480, 640)
    assert psnr(hwc(resize(scaled, (224, 224))), hwc(resize(decode(data), (224, 224)))) > 30


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact(kind):
    assert np.array_equal(hwc(decode(saved(photo(1), kind))), photo(1))


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_other_formats_decode(kind):
    assert decode(saved(photo(1), kind)).shape == (3, 40, 60)


def test_grey_becomes_three_equal_channels():
    grey = photo(2)[..., 0]
    for data in (saved(grey), saved(grey, "JPEG", quality=100)):
        image = decode(data)
        assert image.shape == (3, 40, 60)
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_sixteen_bits_keep_their_range():
    grey = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    image = decode(saved(grey))
    assert np.array_equal(image[0].numpy(), grey >> 8)


def test_transparency_shows_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 0], rgba[:2, :, 3] = 200, 255
    image = decode(saved(rgba))
    assert image[:, 0, 0].tolist() == [200, 0, 0]
    assert image[:, 3, 3].tolist() == [255, 255, 255]
    palette = Image.fromarray(rgba[..., :3]).convert("P", palette=Image.ADAPTIVE, colors=2)
    index = palette.getpixel((3, 3))
    assert decode(saved(palette, transparency=index))[:, 3, 3].tolist() == [255, 255, 255]


def test_palette_gives_its_colours():
    two = np.zeros((4, 4, 3), np.uint8)
    two[0] = (10, 200, 30)
    assert np.array_equal(hwc(decode(saved(Image.fromarray(two).convert("P", palette=Image.ADAPTIVE)))), two)


def test_cmyk_jpeg_is_read_by_pillow():
    data = saved(Image.fromarray(photo(3)).convert("CMYK"), "JPEG", quality=95)
    assert simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK")
    assert psnr(hwc(decode(data)), photo(3)) > 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = saved(photo(4), kind, exif=exif, **options)
    from PIL import ImageOps

    with Image.open(io.BytesIO(data)) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
    assert psnr(hwc(decode(data)) + 1e-9, upright) > 50


def test_scaled_decoding_of_a_turned_picture_exchanges_the_sides():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(photo(4, 400, 1600), "JPEG", exif=exif)
    assert decode(data, min_size=(400, 100)).shape == (3, 400, 100)


def test_too_many_pixels_are_refused_before_decoding():
    bomb = saved(Image.new("L", (3000, 3000)))
    with pytest.raises(BadSample) as caught:
        decode(bomb, max_pixels=8_999_999)
    assert caught.value.kind == "pixels"
    # The header decides: the same header without any pixel data after it gives the same answer.
    for data, limit in ((bomb[:60], 100), (saved(photo(0), "JPEG")[:640], 100)):
        with pytest.raises(BadSample) as caught:
            decode(data, max_pixels=limit)
        assert caught.value.kind == "pixels"
    assert decode(bomb, max_pixels=9_000_000).shape == (3, 3000, 3000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_bad(kind):
    data = encoded(5, kind)
    decode(data)
    with pytest.raises(BadSample) as caught:
        decode(data[: len(data) * 2 // 3])
    assert caught.value.kind == "image"


@pytest.mark.parametrize("data", [b"", b"not an image at all", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"%PDF-1.4"])
def test_what_is_no_image_is_bad(data):
    with pytest.raises(BadSample) as caught:
        decode(data)
    assert caught.value.kind == "image"


def test_a_jpeg_that_only_libjpeg_turbo_frowns_at_is_used():
    data = encoded(5)
    odd = data[:-2] + b"\x00\x00" + data[-2:]
    assert decode(odd).shape == (3, 40, 60)


def test_resize_to_the_shorter_side_keeps_the_ratio():
    image = torch.zeros(3, 100, 250, dtype=torch.uint8)
    assert resize(image, 50).shape == (3, 50, 125)
    assert resize(image.transpose(1, 2), 50).shape == (3, 125, 50)
    assert resize(image, (100, 250)) is image
    assert center_crop(image, 50).shape == (3, 50, 50)


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "LA", "1", "I;16"])
def test_published_pixels_are_those_of_pillows_conversion(mode):
    array = np.random.default_rng(0).integers(0, 256, (8, 9, 4), np.uint8)
    image = Image.fromarray(array, "RGBA")
    if mode == "I;16":
        image = Image.fromarray(np.arange(72, dtype=np.uint16).reshape(8, 9) * 900)
    elif mode != "RGBA":
        image = image.convert("L" if mode == "1" else "RGB" if mode in ("CMYK", "P") else mode).convert(mode)
    data = saved(image, "TIFF" if mode == "CMYK" else "PNG")
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (decode(data, pixels="published").permute(1, 2, 0).numpy() == wanted).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_published_pictures_are_not_turned(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(photo(4, 40, 60), kind, exif=exif)
    assert decode(data).shape == (3, 60, 40) and decode(data, pixels="published").shape == (3, 40, 60)
    assert size_of(data) == (60, 40) and size_of(data, "published") == (40, 60)


def test_the_size_of_a_large_image_is_read_without_a_word_of_pillow_s_limit(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert size_of(saved(Image.new("L", (50, 30)))) == (30, 50)
    assert not recwarn.list
