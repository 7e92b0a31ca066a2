"""Images drawn for tests: of one colour, or like a photo, encoded as files."""

import io

import numpy as np
from PIL import Image


def picture(color: tuple[int, int, int], form: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    """An image file of one colour; `size` is (width, height)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, form)
    return buffer.getvalue()


def photo(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    """uint8 (H, W, 3): smooth waves and a little noise, which JPEG keeps well."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-0.15, 0.15, (3, 3))]
    return (128 + 90 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8)


def encoded(seed: int, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo(seed)).save(buffer, kind, **options)
    return buffer.getvalue()
