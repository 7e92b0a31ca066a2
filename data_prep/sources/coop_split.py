"""The splits of CoOp's few-shot data sets: a root folder of images and their `split_zhou_*.json`.

The file holds {"train": [[path, label, class name], ...], "val": ..., "test": ...}. Samples stay in its order, so
that data_prep/few_shot.py draws the shots that CoOp draws. Source: CoOp, arXiv 2109.01134.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.sources.base import RawSample, Source
from mmpeft_ds.data.formats import STORED_SUFFIXES
from mmpeft_ds.errors import BadInput

SPLITS = ("train", "val", "test")


@dataclass
class Options:
    """Options of the source.

    Attributes:
        root: folder that the paths of the split file are relative to.
        splits_file: CoOp's split file of the data set, such as split_zhou_OxfordPets.json.
        licence: written to the manifest.
    """

    root: Path
    splits_file: Path
    licence: str = "unknown"


class CoopSplit(Source):
    Options = Options

    def __init__(self, options: Options):
        self.options, self.licence = options, options.licence
        if not options.root.is_dir():
            raise BadInput(f"--root {options.root}: no such directory.")
        if not options.splits_file.is_file():
            raise BadInput(f"--splits-file {options.splits_file}: no such file.")

    def splits(self) -> list[str]:
        """Checks the classes and looks for every image before anything is written."""
        self._names  # noqa: B018 - raises where they contradict each other
        missing = [p for items in self._items.values() for p, _, _ in items if not (self.options.root / p).is_file()]
        if missing:
            raise BadInput(
                f"{self.options.root}: {len(missing)} images of {self.options.splits_file} are not there, first "
                f"{missing[0]!r}. Give the --root that its paths are relative to."
            )
        return list(self._items)

    def fingerprint(self) -> dict[str, str]:
        return {self.options.splits_file.name: hashlib.sha256(self.options.splits_file.read_bytes()).hexdigest()}

    def labels(self, split: str) -> list[str]:
        """Class names by CoOp's class index."""
        return [self._names[i] for i in range(len(self._names))]

    def count(self, split: str) -> int:
        return len(self._items[split])

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        for name, label, class_name in self._items[split][start:]:
            path = self.options.root / name
            yield RawSample(name, [(path.suffix[1:], path.read_bytes())], {"label": label, "class_name": class_name})

    @cached_property
    def _items(self) -> dict[str, list[tuple[str, int, str]]]:
        """Split -> (path, class index, class name) in the file's order."""
        file = self.options.splits_file
        try:
            raw = json.loads(file.read_text("utf-8"))
            items = {s: [self._item(entry) for entry in raw[s]] for s in SPLITS if raw.get(s)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{file}: no split file of CoOp ({error}); expected {{'train': [[path, label, class name], ...]}}."
            ) from error
        if not items:
            raise BadInput(f"{file}: holds none of the splits {', '.join(SPLITS)}.")
        return items

    @staticmethod
    def _item(entry: Any) -> tuple[str, int, str]:
        path, label, name = entry
        if not isinstance(path, str) or isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f"entry {str(entry)[:60]}")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"path {path!r} leaves the root")
        if Path(path).suffix.lower() not in STORED_SUFFIXES:
            raise ValueError(f"{path!r} is no image")
        return path, label, str(name)

    @cached_property
    def _names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for items in self._items.values():
            for _, label, name in items:
                if names.setdefault(label, name) != name:
                    raise BadInput(f"{self.options.splits_file}: class {label} is {names[label]!r} and {name!r}.")
        if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
            raise BadInput(f"{self.options.splits_file}: its class numbers have gaps, or two have the same name.")
        return names


ENTRY = CoopSplit
