"""Base of sources that read a data set's official layout: the folder as its publishers give it.

A subclass names the files and turns their records into entries; this base finds the files, says in one line what is
missing and how the folder should look, keeps the index, looks for every picture before anything is written, and counts
what was set aside.
"""

from __future__ import annotations

import abc
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from data_prep.sources.base import RawSample, Source
from data_prep.sources.common import pictures
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import sha256

INDEX = "index.sqlite"
MISSING = {"picture missing", "video missing"}  # reasons to set records aside
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z")  # as publishers give them


@contextlib.contextmanager
def still_there() -> Iterator[None]:
    """For reading what was there when the index was made. Raises BadInput where it fails."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"{error.filename}: cannot be read any more ({error.strerror}), and could be when this preparation began. "
            "Put it back and run the same command again, or start over without it: --overwrite."
        ) from error


@dataclass
class LayoutOptions:
    """Options that every source of an official layout has.

    Attributes:
        root: folder of the data set, in the layout that its publishers give.
        pictures: folder that the layout's picture folders lie in, where it is not the root.
        splits: which splits to prepare (default: all whose files are there).
        limit: first samples of each split only, 0 = all; for a small set of the same form.
        licence: written to the manifest in place of what the publishers state.
    """

    root: Path
    pictures: Path | None = None
    splits: list[str] = field(default_factory=list)
    limit: int = 0
    licence: str = ""


class LayoutSource(Source):
    """A data set in its official layout.

    Attributes:
        title: name of the data set, for messages.
        origin: where its files normally come from, for the message about a missing one.
        layout: how the folder looks, one line: `annotations/captions_train2014.json, train2014/*.jpg, ...`.
        licence: what the publishers state.
        expected: split -> what they, or a count of the files, say: any of `records`, `pictures`, `samples`.
    """

    title: ClassVar[str]
    origin: ClassVar[str]
    layout: ClassVar[str]
    Options: ClassVar[type] = LayoutOptions
    licence = "see the data set's page"
    expected: ClassVar[dict[str, dict[str, int]]] = {}

    def __init__(self, options: Any):
        super().__init__(options)
        self.licence = options.licence or type(self).licence
        self.root: Path = options.root
        self.pictures_root: Path = options.pictures or options.root
        for option, folder in (("--root", self.root), ("--pictures", self.pictures_root)):
            if not folder.is_dir():
                raise BadInput(f"{option} {folder}: no such directory. {self._advice()}")
        if options.limit < 0:
            raise BadInput(f"--limit: {options.limit}. Use 0 for all samples, or a positive number.")
        self._index: Index | None = None

    @abc.abstractmethod
    def files(self) -> dict[str, list[str]]:
        """Split -> its annotation files, relative to the root, in the form that was asked for, best first.

        A split without any file of its own is not listed.
        """

    @abc.abstractmethod
    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        """Records of a split in the order of its files; `index.set_aside` for those that make no sample."""

    @abc.abstractmethod
    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        """Fields of a sample, of what its entries added and the fields of the first."""

    def locate(self, name: str) -> str | Path:
        """Path of the picture that an entry names. Most layouts override nothing else."""
        return os.path.join(self.pictures_root, name)  # a tenth of the time of a Path

    def problem(self, path: str | Path) -> str:
        """Reason why the file of a picture cannot be used, nothing where it can."""
        return pictures.problem(path)

    def read(self, path: str | Path) -> list[tuple[str, bytes]]:
        """(ending, bytes) of the picture, or of the pictures, that a file holds."""
        data = pictures.whole_file(path)
        return [(pictures.ending_by_content(data[: pictures.HEAD]) or Path(path).suffix[1:], data)]

    # What follows is the same for every layout.

    def chosen(self) -> list[str]:
        """Splits to prepare. Raises BadInput that names what is missing, where it comes from, and the layout."""
        files = self.files()
        asked = list(dict.fromkeys(self.options.splits)) or list(files)
        if unknown := [split for split in asked if split not in files]:
            raise BadInput(f"--splits {unknown[0]}: {self.title} has no such split here. Known: {', '.join(files)}.")
        lacking = {split: self._missing(files[split]) for split in asked}
        there = [split for split in asked if not lacking[split]]
        if not there or (self.options.splits and len(there) < len(asked)):
            names = list(dict.fromkeys(name for missing in lacking.values() for name in missing))
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            unpack = f" {self._unpack(self.root)}".rstrip()
            raise BadInput(f"{self.root}: {', '.join(names[:4])}{more} not there.{unpack} {self._advice()}")
        return there

    @staticmethod
    def _unpack(folder: Path) -> str:
        """Advice to unpack archives, if there are any in a folder that lacks something; otherwise empty."""
        packed = [path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in ARCHIVES]
        return f"Unpack {', '.join(packed[:3])}{', ...' if len(packed) > 3 else ''} there." if packed else ""

    def index(self, folder: Path) -> None:
        """Read the annotations of all chosen splits once, look for every picture, and keep the index in `folder`."""
        self._index = Index(folder / INDEX)
        self._index.build(self._fill)

    def begin(self, index: Index) -> None:
        """Read files that are needed before the records of any split, such as the list of answers. Default:
        nothing."""

    def also_read(self) -> list[str]:
        """Files that `begin` reads where they are there, besides those of the splits; none by default."""
        return []

    def first_there(self, *names: str) -> str:
        """The first of several possible places of a file that exists, else the first."""
        return next((name for name in names if (self.root / name).exists()), names[0])

    def pictures_there(self, *names: str) -> str:
        """The first of several possible folders of pictures that exists, else the first."""
        return next((name for name in names if (self.pictures_root / name).is_dir()), names[0])

    def below_root(self, folder: str) -> str:
        """A folder of pictures as `files` names it, which may lie elsewhere."""
        return folder if self.pictures_root == self.root else str((self.pictures_root / folder).absolute())

    def _fill(self, index: Index) -> None:
        self.begin(index)
        for split in self.chosen():
            index.add(split, self.entries(split, index))
            if self.options.limit:
                index.keep_first(split, self.options.limit)
            index.check(split, self._problem_of)

    def _problem_of(self, names: list[str]) -> str:
        for name in names:
            if problem := self._misplaced(name) or self.problem(self.locate(name)):
                return problem
        return ""

    @staticmethod
    def _misplaced(name: str) -> str:
        """A path that leaves the folder of the pictures is not followed."""
        leaves = name.startswith("/") or (".." in name and ".." in name.split("/"))
        return "path leaves the folder" if leaves else ""

    def splits(self) -> list[str]:
        """Splits with samples; those without files are reported on the error stream.

        Raises BadInput if there is none, with what was set aside.
        """
        splits = [split for split in self.chosen() if self._of().size(split)]
        aside = {why for split in self.chosen() for why in self._of().account(split)["aside"]}
        unpack = self._unpack(self.pictures_root) if aside & MISSING else ""
        if not splits:
            why = "; ".join(f"{split}: {self._why_empty(split)}" for split in self.empty())
            raise BadInput(f"{self.root}: no sample is left. {why}. {unpack} {self._advice()}".replace("  ", " "))
        if unpack:
            print(f"note: files are missing below {self.pictures_root}. {unpack}", file=sys.stderr)
        missing = {split: self._missing(names) for split, names in self.files().items()}
        for split, reason in {s: f"{', '.join(names)} not there" for s, names in missing.items() if names}.items():
            if not self.options.splits:
                print(f"note: split {split} is left out: {reason}", file=sys.stderr)
        return splits

    def empty(self) -> list[str]:
        return [split for split in self.chosen() if not self._of().size(split)]

    def _why_empty(self, split: str) -> str:
        """Reasons why a split has no samples."""
        aside = self._of().account(split)["aside"].items()
        reasons = [f"{n} {why} ({', '.join(names[:3])}{', ...' if n > 3 else ''})" for why, (n, names) in aside]
        return "; ".join(reasons) or "no records"

    def fingerprint(self) -> dict[str, str]:
        """sha256 of every annotation file; pictures are looked for by name, their bytes are not read for this."""
        files = self.files()
        also = [name for name in self.also_read() if (self.root / name).is_file()]
        names = dict.fromkeys([*(name for split in self.chosen() for name in files[split]), *also])
        # A folder of pictures is looked through for the index; its files are not read for this.
        return {name: sha256(self.root / name) for name in names if (self.root / name).is_file()}

    def count(self, split: str) -> int:
        return self._of().size(split)

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        for name, files, items, fields in self._of().samples(split, start):
            with still_there():
                images = [image for file in files for image in self.read(self.locate(file))]
            yield RawSample(name, images, self.record(items, fields))

    def account(self, split: str) -> dict[str, Any]:
        return self._of().account(split) | {"expected": {} if self.options.limit else self.expected.get(split, {})}

    def _of(self) -> Index:
        if self._index is None:
            raise RuntimeError("index() comes first")
        return self._index

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not (self.root / name).exists()]

    def _advice(self) -> str:
        return f"{self.title} comes from {self.origin}; expected below --root: {self.layout}"
