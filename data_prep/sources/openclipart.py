"""Open Clip Art: 2,643 drawings with a title and keywords, out of Debian's openclipart-svg; public domain but for two.

    make openclipart-data     unpacks the package into data/raw/openclipart, without root

The SVG files are drawn at preparation, by resvg in a confined process (`common/svg.py`). The captions are the title
and the title with the keywords, in lower case; the class is the folder. Half of the package's files are themes and
series with one title for all; those are set aside, as are links, copies, and what cannot be drawn.

A split is drawn by hash for groups: drawings that look nearly the same, or have titles that differ in numbers and
marks alone, are in one split. So no caption and no near-copy of a test drawing is in train.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.base import RawSample, Source
from data_prep.sources.common import near_equal
from data_prep.sources.common.index import Index
from data_prep.sources.common.splits import SPLITS, by_hash, check_shares
from data_prep.sources.common.svg import Renderer, Unusable
from mmpeft_ds.errors import BadInput

ALL = "all"  # what is set aside has no split
# A program left these among the keywords.
NO_KEYWORD = re.compile(r"hash|(hash)?\(?0x[0-9a-f]+\)?|unsorted|", re.IGNORECASE)
BY_SOMEBODY = re.compile(r"clipart by [^-]*- ", re.IGNORECASE)
PUBLIC_DOMAIN = re.compile(r".*/public-?domain/?", re.IGNORECASE)


@dataclass
class Options:
    """Options of the source.

    Attributes:
        root: folder with the SVG files, in folders of their kinds.
        size: side of the pictures in pixels; a drawing fills it in one direction.
        max_same_title: a title of more drawings than this is that of a series, which says nothing about one of them.
        same_drawing: cosine of two coarse pictures from which on they count as the same drawing for the split.
        val_fraction: share of the groups that becomes the split `val`, chosen by a hash of their titles.
        test_fraction: share of the groups that becomes the split `test`.
    """

    root: Path = Path("data/raw/openclipart/usr/share/openclipart/svg")
    size: int = 256
    max_same_title: int = 5
    same_drawing: float = 0.98
    val_fraction: float = 0.05
    test_fraction: float = 0.15


class OpenClipart(Source):
    Options = Options

    def __init__(self, options: Options):
        check_shares(options.val_fraction, options.test_fraction)
        if not 16 <= options.size <= 2048:
            raise BadInput(f"--size: {options.size}. Use 16 to 2048 pixels, for example 256.")
        if options.max_same_title < 1:
            raise BadInput(f"--max-same-title: {options.max_same_title}. Use 1 or more, for example 5.")
        if not 0 < options.same_drawing <= 1:
            raise BadInput(f"--same-drawing: {options.same_drawing}. Use a cosine above 0, at most 1; 0.98 is usual.")
        if not options.root.is_dir():
            raise BadInput(
                f"--root {options.root}: no such directory. Run `make openclipart-data`, or install the Debian "
                "package openclipart-svg and give /usr/share/openclipart/svg."
            )
        if importlib.util.find_spec("resvg_py") is None:
            raise BadInput("openclipart: drawing SVG files needs resvg: pip install 'mmpeft_ds[svg]', or resvg-py")
        super().__init__(options)
        self._folder = Path()
        self._index: Index | None = None

    @property
    def licence(self) -> str:
        """Licences of the drawings that were taken, the most frequent first; each record has its own."""
        counts = Counter(drawing["licence"] for split in SPLITS for drawing in self._of.kept(split))
        return ", ".join(f"{name} ({number:,})" for name, number in counts.most_common())

    def fingerprint(self) -> dict[str, str]:
        """A hash of names and contents, and what draws them."""
        import resvg_py

        digest = hashlib.sha256()
        for path in self._files:
            digest.update(f"{self._name(path)}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return {
            "names and contents": digest.hexdigest(),
            "resvg-py": resvg_py.__version__,
            "resvg": resvg_py.__resvg_version__,
        }

    def index(self, folder: Path) -> None:
        """Read and draw all files once. The pictures lie in `folder`."""
        self._folder = folder
        self._index = Index(folder / "index.sqlite")
        self._index.build(self._fill)

    def splits(self) -> list[str]:
        splits = [split for split in SPLITS if self.count(split)]
        if "train" not in splits:
            reasons = ", ".join(f"{reason} ({n})" for reason, (n, _) in self._of.account(ALL)["aside"].items())
            raise BadInput(f"{self.options.root}: no drawing is left for training. {reasons or 'No SVG files'}.")
        return splits

    def labels(self, split: str) -> list[str]:
        """Folders in alphabetic order, the same for every split."""
        return sorted({drawing["class_name"] for split in SPLITS for drawing in self._of.kept(split)})

    def count(self, split: str) -> int:
        return len(self._of.kept(split))

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        labels = {name: number for number, name in enumerate(self.labels(split))}
        for drawing in self._of.kept(split)[start:]:
            picture = (self._folder / drawing["picture"]).read_bytes()
            record = {key: drawing[key] for key in ("class_name", "captions", "licence", "creator") if drawing[key]}
            yield RawSample(drawing["name"], [("png", picture)], {"label": labels[drawing["class_name"]], **record})

    def account(self, split: str) -> dict[str, Any]:
        """Counts of what was set aside, reported once, at the first split."""
        return {"aside": self._of.account(ALL)["aside"]} if split == "train" else {}

    def _fill(self, index: Index) -> None:
        """Metadata of all, then pictures of those that have a title of their own, then the splits."""
        with Renderer() as renderer:
            drawings = list(self._titled(index, renderer))
            drawings = list(self._drawn(index, renderer, drawings))
        inks = np.stack([drawing.pop("ink") for drawing in drawings]) if drawings else np.zeros((0, 1))
        same = [*near_equal.pairs(inks, self.options.same_drawing), *_equal_titles(drawings)]
        group = near_equal.groups(len(drawings), same)
        titles = [_letters(drawings[first]["captions"][0]) for first in group]
        split = by_hash({"": titles}, self.options.val_fraction, self.options.test_fraction)
        for name in SPLITS:
            index.keep(name, [d for d, title in zip(drawings, titles, strict=True) if split[title] == name])

    def _titled(self, index: Index, renderer: Renderer) -> Iterator[dict[str, Any]]:
        """Drawings with a title that is not that of a series, in the order of their paths."""
        drawings = []
        for path in self._files:
            try:
                about = renderer.metadata(path.read_bytes())
            except (Unusable, OSError) as error:
                index.set_aside(ALL, str(error) if isinstance(error, Unusable) else "cannot be read", self._name(path))
                continue
            title = _plain(BY_SOMEBODY.sub("", about["title"]))
            if not _letters(title):
                index.set_aside(ALL, "without a title", self._name(path))
                continue
            kind = (
                _plain(path.relative_to(self.options.root).parts[0]) if path.parent != self.options.root else "other"
            )
            drawings.append({"name": self._name(path), "title": title, "class_name": kind, **_taken(about, title)})
        of_title = Counter(_letters(drawing["title"]) for drawing in drawings)
        for drawing in drawings:
            if of_title[_letters(drawing.pop("title"))] > self.options.max_same_title:
                index.set_aside(ALL, "has the title of a series", drawing["name"])
            else:
                yield drawing

    def _drawn(self, index: Index, renderer: Renderer, drawings: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Those of which a picture could be made that shows something new."""
        seen: set[str] = set()
        for drawing in drawings:
            try:
                png = renderer.png((self.options.root / drawing["name"]).read_bytes(), self.options.size)
                coarse = near_equal.ink(png)
                key = hashlib.sha256(png).hexdigest()
                if not coarse.any():
                    raise Unusable("nothing to be seen on white")
                if key in seen:
                    raise Unusable("equal to another drawing")
            except Unusable as error:
                index.set_aside(ALL, str(error), drawing["name"])
                continue
            seen.add(key)
            (self._folder / f"{key}.png").write_bytes(png)
            yield drawing | {"picture": f"{key}.png", "ink": coarse}

    @cached_property
    def _files(self) -> list[Path]:
        """All SVG files in order of path; links lead to other files of the package, or anywhere."""
        return [path for path in sorted(self.options.root.rglob("*.svg")) if path.is_file() and not path.is_symlink()]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.options.root).as_posix()

    @property
    def _of(self) -> Index:
        if self._index is None:
            raise RuntimeError("index() comes first")
        return self._index


def _taken(about: dict[str, Any], title: str) -> dict[str, Any]:
    """Fields of the record."""
    keywords = [_plain(word) for word in about["keywords"] if not NO_KEYWORD.fullmatch(word)]
    licence = "public domain" if PUBLIC_DOMAIN.fullmatch(about["licence"]) else about["licence"] or "not stated"
    captions = list(dict.fromkeys([title, ", ".join(dict.fromkeys([title, *keywords]))]))
    return {"captions": captions, "licence": licence, "creator": about["creator"]}


def _plain(text: str) -> str:
    """Lower case, single spaces, no underscores, no entities of HTML."""
    return " ".join(html.unescape(text).replace("_", " ").casefold().split())


def _letters(title: str) -> str:
    """A title without numbers and marks: those that are equal here are the same for the split."""
    return " ".join(re.findall(r"[^\W\d_]+", title))


def _equal_titles(drawings: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    first: dict[str, int] = {}
    for number, drawing in enumerate(drawings):
        yield first.setdefault(_letters(drawing["captions"][0]), number), number


ENTRY = OpenClipart
