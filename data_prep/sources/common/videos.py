"""Videos as frames: some frames of each, spread evenly over its length, stored as JPEG pictures with their times.

A video of T seconds is cut into as many equal parts as frames are wanted, and the frame that is shown in the middle of
each part is taken. A video that breaks off gives the frames that decode. Decoding is PyAV's, the extra `video`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
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
        for path in sorted(_files(self.pictures_root)):
            ending = path.suffix.lower()
            if ending in ENDINGS or path.name.endswith("."):
                found.setdefault(name_of(path.name), path)
        return found


def _files(root: Path) -> Iterator[Path]:
    """All files below a folder, also in folders that links lead to, each folder once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in names)


def name_of(video: str) -> str:
    """Name of a video without its folders and its ending, which may be a bare dot; other dots belong to the name."""
    path = PurePosixPath(video)
    return path.stem if path.suffix.lower() in ENDINGS else path.name.removesuffix(".")


def sample(path: Path, count: int, quality: int) -> Frames:
    """`count` frames of a video, evenly spread; times count from its first frame. Raises BadInput if none decodes."""
    span = _span(path)
    wanted = [span.start + (i + 0.5) * span.length / count for i in range(count)]
    kept: list[tuple[float, Any]] = []
    last, end, cut = None, span.start, span.cut
    with _pyav().open(str(path)) as container:
        for number, frame in enumerate(_decoded(container)):
            if frame is None:
                cut = True
                continue
            time = span.start + number / span.rate if frame.time is None else frame.time
            while wanted and last is not None and time > wanted[0]:
                kept.append((wanted.pop(0), last))
            last = time, frame
            end = time + (float(frame.duration * frame.time_base) if frame.duration else 1 / span.rate)
            if not wanted:
                break
    if wanted and span.start + span.length - end > span.slack:
        # A last frame is shown until the end; one that ends long before it is where the video breaks off.
        cut, wanted = True, [time for time in wanted if time <= end]
    frames = [frame for _, frame in kept] + [last] * max(len(wanted), not kept)
    if last is None:
        raise BadInput(f"{path}: no frame decodes. Download the video again, or take it out of the list.")
    pictures = [("jpg", _jpeg(frame, quality)) for _, frame in frames]
    return Frames(pictures, [round(time - span.start, 3) for time, _ in frames], cut)


@dataclass
class _Span:
    """Seconds at which a video starts and its length, whether its file ends before it, and frames a second."""

    start: float
    length: float
    cut: bool
    rate: float

    @property
    def slack(self) -> float:
        return max(0.5, 3 / self.rate)


def _span(path: Path) -> _Span:
    """By the packets of the file, undecoded: headers may lack the length, and cameras start at any time."""
    av = _pyav()
    starts: list[float] = []
    end = last = 0.0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        with contextlib.suppress(av.FFmpegError):  # what comes after does not count
            for packet in container.demux():
                if not packet.size or packet.time_base is None:
                    continue
                at = packet.dts if packet.pts is None else packet.pts
                begins = len(starts) / rate if at is None else float(at * packet.time_base)
                ends = begins + (float(packet.duration * packet.time_base) if packet.duration else 0)
                last = max(last, ends)
                if packet.stream.index == stream.index:
                    starts.append(begins)
                    end = max(end, ends, begins + (0 if packet.duration else 1 / rate))
        start = min(starts, default=0.0)
        length = max(end - start, 0.0)
        if stream.duration:
            told, there = float(stream.duration * stream.time_base), length
        else:
            told, there = (container.duration or 0) / 1e6, last
    span = _Span(start, length, False, rate)
    if told - there > span.slack:
        span = _Span(start, length + told - there, True, rate)
    return span


def _decoded(container: Any) -> Iterator[Any]:
    """Frames of a container's first video; None for each part that does not decode."""
    error = _pyav().FFmpegError
    stream = container.streams.video[0]
    stream.thread_type = "NONE"  # the same frames whatever the machine
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            yield from packet.decode()
        except error:
            yield None


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
