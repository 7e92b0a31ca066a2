"""Videos as frames: some frames of each, spread evenly over its length, stored as JPEG pictures with their times.

A video of T seconds is cut into as many equal parts as frames are wanted, and the frame that is shown in the middle of
each part is taken. A video that breaks off gives the frames that decode. Decoding is PyAV's, the extra `video`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.sources.base import RawSample
from data_prep.sources.common.layout import LayoutOptions, LayoutSource
from mmpeft_ds.errors import BadInput

ENDINGS = frozenset(
    [".mp4", ".avi", ".mov", ".mpg", ".mpeg", ".m4v", ".3gp", ".3g2", ".wmv", ".mts", ".m2ts", ".mkv", ".webm", ".flv"]
)


@dataclass
class VideoOptions(LayoutOptions):
    """Options that every source of videos has.

    Attributes:
        frames: how many frames of each video are stored.
        quality: of the stored JPEG frames, 1 to 95.
    """

    frames: int = 8
    quality: int = 90


@dataclass
class Frames:
    """Frames of a video: encoded pictures, their times in seconds, and whether it broke off before its end."""

    pictures: list[tuple[str, bytes]]
    times: list[float]
    cut: bool


class VideoSource(LayoutSource):
    """Base of sources whose samples are videos; an entry names one file, the record gets `frame_times`.

    A video that breaks off has `cut: true` in its record, and fewer frames where the rest does not decode.
    """

    Options = VideoOptions

    def __init__(self, options: Any):
        super().__init__(options)
        if not 1 <= options.frames <= 1024:
            raise BadInput(f"--frames: {options.frames}. Use a number from 1 to 1024, for example 8.")
        if not 1 <= options.quality <= 95:
            raise BadInput(f"--quality: {options.quality}. Use a number from 1 to 95, for example 90.")
        _pyav()

    def problem(self, path: Path) -> str:
        """Opens the file and looks for a stream of pictures; decodes its first frame."""
        if not path.is_file():
            return "video missing"
        av = _pyav()
        try:
            with av.open(str(path)) as container:
                next(container.decode(video=0))
        except (av.FFmpegError, StopIteration, IndexError):
            return "video cannot be decoded"
        return ""

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        for name, files, items, fields in self._of().samples(split, start):
            frames = sample(self.locate(files[0]), self.options.frames, self.options.quality)
            record = self.record(items, fields) | {"frame_times": frames.times}
            yield RawSample(name, frames.pictures, record | ({"cut": True} if frames.cut else {}))

    def locate(self, name: str) -> Path:
        """The file of a video by its name without ending, in the folder of the pictures or one of its folders."""
        return self._there.get(name, self.pictures_root / f"{name}.mp4")

    @cached_property
    def _there(self) -> dict[str, Path]:
        """Name without ending -> file, the first in the order of paths; names may end in a bare dot."""
        found: dict[str, Path] = {}
        for path in sorted(self.pictures_root.rglob("*")):
            ending = path.suffix.lower()
            if ending in ENDINGS or path.name.endswith("."):
                found.setdefault(re.sub(r"\.[^.]*$", "", path.name), path)
        return found


def sample(path: Path, count: int, quality: int) -> Frames:
    """`count` frames of a video, evenly spread. Raises BadInput if not even one decodes."""
    av = _pyav()
    times: list[float] = []
    kept: list[Any] = []
    cut = False
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # the same frames whatever the machine
        length = _length(container, stream)
        wanted = [(i + 0.5) * length / count for i in range(count)] if length else []
        last = None
        try:
            for number, frame in enumerate(container.decode(stream)):
                time = frame.time if frame.time is not None else number / float(stream.average_rate or 25)
                while wanted and last is not None and time > wanted[0]:
                    kept.append(last[1])
                    times.append(last[0])
                    wanted.pop(0)
                last = (time, frame)
                if length and not wanted:
                    break
        except av.FFmpegError:
            cut = True
        if wanted and last is not None:
            # A last frame is shown until the end; one that stands long before it is where the video breaks off.
            cut = cut or length - last[0] > max(0.5, 3 / float(stream.average_rate or 25))
            if not cut:
                kept += [last[1]] * len(wanted)
                times += [last[0]] * len(wanted)
        if not kept and last is not None:
            kept, times = [last[1]], [last[0]]
    if not kept:
        raise BadInput(f"{path}: no frame decodes. Download the video again, or take it out of the list.")
    return Frames([("jpg", _jpeg(frame, quality)) for frame in kept], [round(time, 3) for time in times], cut)


def _length(container: Any, stream: Any) -> float:
    """Seconds of a video, as its header says."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / 1e6
    return float(stream.frames / stream.average_rate) if stream.frames and stream.average_rate else 0.0


def _jpeg(frame: Any, quality: int) -> bytes:
    buffer = io.BytesIO()
    frame.to_image().save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise BadInput("videos are read by PyAV, which is not installed: pip install 'mmpeft_ds[video]'") from error
    return av
