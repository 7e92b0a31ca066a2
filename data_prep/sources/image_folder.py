"""A folder of images whose sub-folders are the classes, with or without train/val/test folders above them.

FOLDER/cat/1.jpg FOLDER/dog/1.jpg            one split, or a hash split with --val-fraction, --test-fraction
FOLDER/train/cat/1.jpg FOLDER/val/cat/2.jpg  the splits as they are; also Training, valid, dev, test2017, ...
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.common.duplicates import SHOWN
from data_prep.sources.base import RawSample, Source
from mmpeft_ds.data.formats import STORED_SUFFIXES
from mmpeft_ds.errors import BadInput

SPLITS = ("train", "val", "test")
_SPLIT_OF = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "minival"), "val"),
    **dict.fromkeys(("dev", "devel", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_LONGEST_FIRST = re.compile("|".join(sorted(_SPLIT_OF, key=len, reverse=True)))
_BESIDE_SPLIT = frozenset(("set", "sets", "data", "dataset", "images", "image", "imgs", "img", "split"))


@dataclass
class Options:
    """Options of the source.

    Attributes:
        folder: folder that holds the class folders, or train/val/test folders of them.
        val_fraction: share of every class that becomes the split `val`, chosen by a hash of the file name.
        test_fraction: share of every class that becomes the split `test`.
        as_classes: the folders below `folder` are classes, even those that are named like splits.
        licence: written to the manifest.
    """

    folder: Path
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    as_classes: bool = False
    licence: str = "unknown"


class ImageFolder(Source):
    Options = Options

    def __init__(self, options: Options):
        self.options = options
        self.licence = options.licence
        self._skipped: dict[Path, list[Path]] = {}  # folder of classes -> files in it that are no sample
        if not options.folder.is_dir():
            raise BadInput(f"--folder {options.folder}: no such directory.")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(options, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise BadInput(f"{flag}: {getattr(options, name)} is not in [0, 1), for example 0.1.")
        if options.val_fraction + options.test_fraction >= 1:
            raise BadInput("--val-fraction and --test-fraction: together they leave nothing for training.")

    def splits(self) -> list[str]:
        unknown = sorted({c for images in self._images.values() for c, _ in images} - set(self._classes))
        if unknown:
            first = next(iter(self._images))
            raise BadInput(f"{self.options.folder}: class {unknown[0]!r} has no images in {first}. Remove or move it.")
        return list(self._images)

    def fingerprint(self) -> dict[str, str]:
        """Names and sizes of all images: a changed file of the same size goes unnoticed, and nothing is read twice."""
        digest = hashlib.sha256()
        for split, images in self._images.items():
            for _, path in images:
                digest.update(f"{split}\t{path.relative_to(self.options.folder)}\t{path.stat().st_size}\n".encode())
        return {"image names and sizes": digest.hexdigest()}

    def labels(self, split: str) -> list[str]:
        return self._classes

    def count(self, split: str) -> int:
        return len(self._images[split])

    def account(self, split: str) -> dict[str, Any]:
        """Files that are no pictures of a class; those of a folder without splits stand under `train`."""
        own = [folder for folder in self._skipped if split_of(folder.name) == split and folder != self.options.folder]
        folders = own or ([self.options.folder] if split == "train" else [])
        skipped = [path for folder in folders for path in self._skipped.get(folder, [])]
        names = [_shown(path.relative_to(self.options.folder)) for path in skipped[:SHOWN]]
        records = {"records": self.count(split) + len(skipped)}
        return records | {"aside": {"no picture in a class folder": [len(skipped), names]}} if skipped else {}

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        index = {name: i for i, name in enumerate(self._classes)}
        for name, path in self._images[split][start:]:
            record = {"label": index[name], "class_name": name}
            source_name = str(path.relative_to(self.options.folder))
            yield RawSample(source_name, [(path.suffix[1:], path.read_bytes())], record)

    @cached_property
    def _classes(self) -> list[str]:
        """Class names in alphabetic order, which is the class index."""
        return sorted({name for name, _ in next(iter(self._images.values()))})

    @cached_property
    def _images(self) -> dict[str, list[tuple[str, Path]]]:
        """Split -> (class, file) in order of class and name; the training split comes first."""
        folder = self.options.folder
        splits: dict[str, Path] = {}
        classes = []
        for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))):
            split = None if self.options.as_classes else split_of(path.name)
            if split is None:
                classes.append(path.name)
            elif split in splits:
                raise BadInput(f"{folder}: {splits[split].name!r} and {path.name!r} both mean {split}. Move one away.")
            else:
                splits[split] = path
        if not splits:
            return self._hash_split(self._of_classes(folder))
        if classes:
            raise BadInput(
                f"{folder}: {next(iter(splits.values())).name!r} is named like a split, {classes[0]!r} beside it is "
                "not. Put classes into folders of splits, or, if all are classes, say --as-classes."
            )
        if self.options.val_fraction or self.options.test_fraction:
            names = ", ".join(path.name for path in splits.values())
            raise BadInput(f"{folder}: has its own splits ({names}); leave out --val-fraction and --test-fraction.")
        return {split: self._of_classes(splits[split]) for split in SPLITS if split in splits}

    def _of_classes(self, folder: Path) -> list[tuple[str, Path]]:
        images, skipped = [], []
        deeper: dict[int, set[str]] = {}  # depth -> names of the folders there
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            parts = path.relative_to(folder).parts
            if any(p.startswith(".") for p in parts):
                continue
            if path.suffix.lower() in STORED_SUFFIXES and len(parts) > 1:
                images.append((parts[0], path))
                for depth, name in enumerate(parts[1:-1]):
                    deeper.setdefault(depth, set()).add(name)
            else:
                skipped.append(path)
        if not images:
            raise BadInput(f"{folder}: no images in class folders. Expected {folder}/CLASS/IMAGE.jpg")
        for _, path in images:
            try:
                str(path).encode()
            except UnicodeEncodeError as error:
                raise BadInput(f"{path}: this name is not UTF-8, so no record can hold it. Rename it.") from error
        if not self.options.as_classes:
            self._refuse_splits(folder, {name for name, _ in images}, "classes of")
            for names in deeper.values():
                self._refuse_splits(folder, names, "folders below the class folders of")
        self._skipped[folder] = skipped
        self._tell(folder, images, skipped)
        return images

    @staticmethod
    def _refuse_splits(folder: Path, names: set[str], what: str) -> None:
        parts = [_split_words(name) for name in names]
        of_different_splits = all(len(words) == 1 for words in parts) and len(set().union(*parts)) > 1
        like_splits = names if of_different_splits or all(split_of(name) for name in names) else _siblings(names)
        if like_splits:
            raise BadInput(
                f"{folder}: {', '.join(sorted(like_splits))} are {what} this folder, but look like splits. Expected "
                "FOLDER/SPLIT/CLASS/IMAGE.jpg with splits train, val and test: give the --folder that holds them, "
                "rename them, or say --as-classes."
            )

    @staticmethod
    def _tell(folder: Path, images: list[tuple[str, Path]], skipped: list[Path]) -> None:
        """Report skipped files and other defects of a folder."""
        notes = [
            (skipped, "files are no images in a class folder"),
            (
                [path for name, path in images if path.parent != folder / name],
                "images lie in folders below their class folder, and count as its class",
            ),
            (
                sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in dict(images)),
                "folders hold no image, and are no classes",
            ),
        ]
        for paths, what in notes:
            if paths:
                print(f"{folder}: {len(paths)} {what}, such as {_shown(paths[0])}", file=sys.stderr)

    def _hash_split(self, images: list[tuple[str, Path]]) -> dict[str, list[tuple[str, Path]]]:
        """The same share of every class; which files depends on their names alone."""
        shares = {"val": self.options.val_fraction, "test": self.options.test_fraction}
        by_class: dict[str, list[Path]] = {}
        for name, path in images:
            by_class.setdefault(name, []).append(path)
        chosen: dict[Path, str] = {}
        for paths in by_class.values():
            names = {p: str(p.relative_to(self.options.folder)) for p in paths}
            order = sorted(paths, key=lambda p: hashlib.blake2b(names[p].encode()).digest())
            for split, share in shares.items():
                for path in order[: round(len(paths) * share)]:
                    chosen[path] = split
                order = order[round(len(paths) * share) :]
        splits = ["train", *(s for s, share in shares.items() if share)]
        return {s: [(c, p) for c, p in images if chosen.get(p, "train") == s] for s in splits}


def _shown(path: Path) -> str:
    """A path as text, whose bytes that are not UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def split_of(name: str) -> str | None:
    """The split that a folder of this name means: `Training`, `val2017`, `test_images`; None for any other name."""
    words, splits = _words(name), _split_words(name)
    known = all(word in _SPLIT_OF or word in _BESIDE_SPLIT for word in words)
    return splits.pop() if known and len(splits) == 1 else None


def _split_words(name: str) -> set[str]:
    """The splits that words of a name mean, whatever stands beside them: `seg_train`, `val_clean`."""
    return {_SPLIT_OF[word] for word in _words(name) if word in _SPLIT_OF}


def _siblings(names: set[str]) -> set[str]:
    """Names that differ by the split alone: `seg_train` and `seg_test`, `traindata` and `testdata`."""
    splits: dict[str, dict[str, str]] = {}
    for name in names:
        for word in _LONGEST_FIRST.finditer(name.lower()):
            rest = f"{name[: word.start()]}/{name[word.end() :]}".lower()
            splits.setdefault(rest, {}).setdefault(_SPLIT_OF[word[0]], name)
    return {name for group in splits.values() if len(group) > 1 for name in group.values()}


def _words(name: str) -> list[str]:
    """Words of a name in lower case, `trainset` as `train`."""
    words = re.findall("[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    return [word.removesuffix("set") if word.removesuffix("set") in _SPLIT_OF else word for word in words]


ENTRY = ImageFolder
