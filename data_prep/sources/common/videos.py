"""Base of sources of videos: of each some frames, spread evenly over its length, are stored as JPEG pictures with
their times."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.base import RawSample
from data_prep.sources.common.layout import LayoutOptions, LayoutSource, still_there
from mmpeft_ds.data import video_files
from mmpeft_ds.data.video_files import ENDINGS, QUALITY
from mmpeft_ds.errors import BadInput


@dataclass
class VideoOptions(LayoutOptions):
    """Options that every source of videos has.

    Attributes:
        frames: how many frames of each video are stored.
        quality: of the stored JPEG frames, 1 to 95.
    """

    frames: int = 8
    quality: int = QUALITY


class VideoSource(LayoutSource):
    """Base of sources whose samples are videos; an entry names one file, the record gets `frame_times`.

    A video that breaks off has `cut: true` in its record, and fewer frames where the rest does not decode.
    """

    Options = VideoOptions

    def __init__(self, options: Any):
        super().__init__(options)
        check_options(options)
        video_files.pyav()

    def problem(self, path: Path) -> str:
        return video_files.problem(path)

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        for name, files, items, fields in self._of().samples(split, start):
            with still_there():
                frames = video_files.sample(self.locate(files[0]), self.options.frames, self.options.quality)
            record = self.record(items, fields) | {"frame_times": frames.times}
            yield with_videos(RawSample(name, [], record), [frames])

    def locate(self, name: str) -> Path:
        """The file of a video by its name without ending, in the folder of the pictures or one of its folders."""
        return self._there.get(name, self.pictures_root / f"{name}.mp4")

    @cached_property
    def _there(self) -> dict[str, Path]:
        """Name without ending -> file, the first in the order of paths; names may end in a bare dot."""
        files: dict[str, Path] = {}
        for path in sorted(_files(self.pictures_root)):
            ending = path.suffix.lower()
            if ending in ENDINGS or path.name.endswith("."):
                files.setdefault(name_of(path.name), path)
        return files


def with_videos(sample: RawSample, videos: Sequence[video_files.Frames]) -> RawSample:
    """A sample whose record says which of its pictures, the last ones, are frames of videos."""
    if videos:
        sample.images += [picture for frames in videos for picture in frames.pictures]
        sample.record["videos"] = [frames.record() for frames in videos]
        if any(frames.cut for frames in videos):
            sample.record["cut"] = True
    return sample


def check_options(options: Any) -> None:
    """Raise BadInput for `frames` or `quality` out of range."""
    if not 1 <= options.frames <= 1024:
        raise BadInput(f"--frames: {options.frames}. Use a number from 1 to 1024, for example 8.")
    if not 1 <= options.quality <= 95:
        raise BadInput(f"--quality: {options.quality}. Use a number from 1 to 95, for example 90.")


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
