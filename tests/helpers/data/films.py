"""Videos made here, whose frames are known."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def film(path: Path, seconds: int = 4, rate: int = 10, noise: bool = False) -> Path:
    """A video whose frame at second t is as bright as 20 t + 40."""
    generator = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format={".avi": "avi"}.get(path.suffix, "mp4")) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 5
        for number in range(seconds * rate):
            shade = int(20 * number / rate) + 40
            pixels = generator.integers(0, 256, (32, 32, 3)) if noise else np.full((32, 32, 3), shade)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
