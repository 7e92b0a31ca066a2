"""Files of videos: some frames of each, spread evenly over its length, as JPEG pictures with their times.

A video of T seconds is cut into as many equal parts as frames are wanted, and the frame that is shown in the middle of
each part is taken. A video that breaks off gives the frames that decode. Decoding is PyAV's, the extra `video`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft_ds.errors import BadInput

ENDINGS = frozenset(
    [".mp4", ".avi", ".mov", ".mpg", ".mpeg", ".m4v", ".3gp", ".3g2", ".wmv", ".mts", ".m2ts", ".mkv", ".webm", ".flv"]
)


QUALITY = 90  # of the JPEG frames, unless stated otherwise


@dataclass
class Frames:
    """Frames of a video: encoded pictures, their times in seconds, whether it broke off before its end, and how long
    it is in seconds."""

    pictures: list[tuple[str, bytes]]
    times: list[float]
    cut: bool
    duration: float

    def record(self) -> dict[str, Any]:
        """The entry of a sample's record for the video, see `data.video`."""
        return {"times": self.times, "duration": self.duration}


def is_video(path: Path) -> bool:
    """Whether a file looks like a video, by its ending."""
    return path.suffix.lower() in ENDINGS


def problem(path: Path) -> str:
    """Reason why a file cannot be used, nothing where it can: it is opened, and its first frame decoded."""
    if not path.is_file():
        return "video missing"
    av = pyav()
    try:
        with av.open(str(path)) as container:
            next(container.decode(video=0))
    except (av.FFmpegError, StopIteration, IndexError):
        return "video cannot be decoded"
    return ""


def sample(path: Path, count: int, quality: int) -> Frames:
    """`count` frames of a video, evenly spread; times count from its first frame. Raises BadInput if none decodes."""
    span = _span(path)
    wanted = [span.start + (i + 0.5) * span.length / count for i in range(count)]
    kept: list[tuple[float, Any]] = []
    last, end, cut = None, span.start, span.cut
    with pyav().open(str(path)) as container:
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
    return Frames(pictures, [round(time - span.start, 3) for time, _ in frames], cut, round(span.length, 3))


@dataclass
class _Span:
    """Seconds at which a video starts and its length, whether its file ends before it, and frames per second."""

    start: float
    length: float
    cut: bool
    rate: float

    @property
    def slack(self) -> float:
        return max(0.5, 3 / self.rate)


def _span(path: Path) -> _Span:
    """By the packets of the file, undecoded: headers may lack the length, and cameras start at any time."""
    av = pyav()
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
    error = pyav().FFmpegError
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


def pyav() -> Any:
    """The package that decodes videos. Raises BadInput where it is missing."""
    try:
        import av
    except ImportError as error:
        raise BadInput("videos are read by PyAV, which is not installed: pip install 'mmpeft_ds[video]'") from error
    return av
