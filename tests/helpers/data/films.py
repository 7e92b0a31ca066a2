"""Videos made here, whose frames are known."""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FORMATS = {".avi": "avi", ".m4v": "m4v", ".mkv": "matroska"}  # ending -> container; others are MP4


def film(
    path: Path, seconds: int = 4, rate: int = 10, noise: bool = False, start: int = 0, shown: Collection[int] = ()
) -> Path:
    """A video whose frame at second t is as bright as 20 t + 40.

    Args:
        start: second of its clock at which the first frame stands.
        shown: numbers of the frames that there are, for a variable rate; empty for all of them.
    """
    generator = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=FORMATS.get(path.suffix, "mp4")) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 5
        for number in shown or range(seconds * rate):
            shade = int(20 * number / rate) + 40
            pixels = generator.integers(0, 256, (32, 32, 3)) if noise else np.full((32, 32, 3), shade)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = start * rate + number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
