"""Videos as frames with times: how a record says which pictures of its sample are frames, and what transforms take.

A record's `videos` is a list with one object a video: `times`, in seconds from its start, one for each frame, and
optionally `duration`. The frames of all videos are the last pictures of the sample, in order. Data sets prepared
before `videos` was written have `frame_times` in its place: all pictures are then the frames of one video.
"""

# F frames

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmpeft_ds.errors import BadSample

if TYPE_CHECKING:  # preparation works without torch
    from torch import Tensor

FIELDS = ("videos", "frame_times")


@dataclass(frozen=True)
class Times:
    """Times of a video's frames.

    Attributes:
        of_frames: seconds from the start of the video, not decreasing.
        duration: of the video in seconds.
    """

    of_frames: tuple[float, ...]
    duration: float


@dataclass(frozen=True)
class Video:
    """A decoded video.

    Attributes:
        frames: uint8 (F, 3, H, W), RGB.
        times: of the frames.
    """

    frames: Tensor
    times: Times


def times_of(record: Mapping[str, Any], pictures: int) -> list[Times]:
    """The videos of a sample with that many pictures; none in most. Raises BadSample."""
    entries = record.get("videos")
    if entries is None:
        entries = [{"times": record["frame_times"]}] if "frame_times" in record else []
    if not isinstance(entries, list):
        raise BadSample("videos", "`videos` is no list of videos")
    videos = [_times(video) for video in entries]
    frames = sum(len(video.of_frames) for video in videos)
    if frames > pictures or ("videos" not in record and videos and frames != pictures):
        raise BadSample("videos", f"there are times of {frames} frames, but {pictures} pictures")
    return videos


def stacked(frames: Sequence[Tensor], times: Times) -> Video:
    """A video of decoded frames (3, H, W). Raises BadSample if they differ in size."""
    import torch

    if len({frame.shape for frame in frames}) > 1:
        raise BadSample("videos", "the frames of a video differ in size")
    return Video(torch.stack(list(frames)), times)


def evenly(frames: int, rate: float = 1.0) -> Times:
    """Times of frames of which `rate` are shown in a second, from 0 on."""
    return Times(tuple(i / rate for i in range(frames)), frames / rate)


def _times(video: Any) -> Times:
    times = video.get("times") if isinstance(video, Mapping) else None
    if not isinstance(times, list) or not times or not all(map(_is_time, times)) or times != sorted(times):
        raise BadSample("videos", "a video needs `times`, a list of seconds that do not decrease, one for each frame")
    duration = video.get("duration")
    if duration is None:  # frames that are spread evenly stand as far apart as they stand for
        gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        duration = max(gap * len(times), times[-1], 1e-3)
    if not _is_time(duration) or not duration:
        raise BadSample("videos", "the `duration` of a video is a number of seconds above 0")
    return Times(tuple(map(float, times)), float(duration))


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
