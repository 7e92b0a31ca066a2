"""What every loader of the loader benchmark does with a picture, and how its batches are timed."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmpeft_ds.data.transform import ImageTransform  # noqa: E402

SIZE, BATCH, SHUFFLE, SEED = 224, 64, 1000, 1
# In it are the same photos as `prepare.py --resize` stores them.
RESIZED = "resized"
# A rate is taken over the batches after these, so that batches made while waiting for the first do not count.
WARM_UP = 8


def timed(batches, begin: float) -> dict:
    """Rate and time to the first batch of an iterable of (keys, images)."""
    times, counts = [], []
    for keys, images in batches:
        assert tuple(images.shape[1:]) in ((3, SIZE, SIZE), (SIZE, SIZE, 3))
        times.append(time.perf_counter())
        counts.append(len(keys))
    seconds = times[-1] - times[WARM_UP - 1]
    return {"rate": sum(counts[WARM_UP:]) / seconds, "first": times[0] - begin, "samples": sum(counts)}


def pil_224(data: bytes):
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC))


class Transform(ImageTransform):
    min_size = (SIZE, SIZE)

    def __call__(self, image, generator=None):
        from mmpeft_ds.data.decode import resize

        return resize(image, (SIZE, SIZE))


def our_224(data: bytes, scaled: bool = False):
    from mmpeft_ds.data.decode import decode

    return Transform()(decode(data, min_size=Transform.min_size if scaled else None))


def stack(images):
    import torch

    return torch.stack([torch.as_tensor(image) for image in images])
