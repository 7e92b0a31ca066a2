"""Checks of all lines of JSONL files, and of the files that they name, before anything is written."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from data_prep.sources.common import feature_rows
from mmpeft_ds.data import video_files
from mmpeft_ds.errors import BadInput, counted

SHOWN = 20


@dataclass
class Film:
    """A video of a line: its file, or the files of its frames with their times in seconds."""

    files: list[Path]
    times: list[float] | None = None


@dataclass
class LineChecks:
    """Checks of every line, and what they have found so far.

    Attributes:
        problems: place and text of each line that cannot be used.
        missing: the same for each file that cannot, by its path: several lines may name it.
        extra: how many lines have each key that no task reads.
        arrays: number of rows -> the first array that has so many.
        seen: videos that were opened.
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)
    extra: Counter[str] = field(default_factory=Counter)
    arrays: dict[int, Path] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)

    def look_for(self, place: str, images: list[Path], videos: list[Film]) -> None:
        """Note which files of a line are not there, or cannot be read."""
        for path in chain(images, *(film.files for film in videos)):
            if path.suffix == ".npy" and path.is_file():
                try:
                    self.arrays.setdefault(feature_rows.number_of(path), path)
                except (OSError, ValueError) as error:
                    unread = f"{path}: cannot be read as an array ({error}). Store it with numpy.save."
                    self.missing[str(path)] = (place, unread)
            if str(path) not in self.missing and not path.is_file():
                self.missing[str(path)] = (place, f"{path} does not exist")
        for path in (film.files[0] for film in videos if film.times is None):
            if path not in self.seen and path.is_file() and (wrong := video_files.problem(path)):
                self.problems.append((place, f"{path}: {wrong}"))
            self.seen.add(path)

    def refuse(self, names: str) -> None:
        """Print the first problems, those of equal text once. Raises BadInput where there are any."""
        lines: dict[str, list[str]] = {}
        for place, text in (*self.problems, *self.missing.values()):
            lines.setdefault(text, []).append(place)
        shown = dict(islice(lines.items(), SHOWN))
        for text, places in shown.items():
            more = f" (so in {counted(len(places) - 1, 'further line')})" if len(places) > 1 else ""
            print(f"{places[0]}: {text}{more}", file=sys.stderr)
        if lines:
            total, printed = (sum(map(len, some.values())) for some in (lines, shown))
            above = f", {printed} of them shown above" if printed < total else ", shown above"
            raise BadInput(
                f"{names}: {counted(total, 'problem')}{above}. Nothing was written. Mend these lines or remove them."
            )
