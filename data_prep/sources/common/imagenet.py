"""ImageNet's classes and folders, which several data sets share (specs/datasets.md 15).

A class is its folder: 1,000 folders have 998 names. The two pairs of equal names (missile, sunglasses) get their
folder behind the name, since results could not tell them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.sources.common import annotations
from data_prep.sources.common.index import Entry
from mmpeft_ds.errors import BadInput

HIDDEN = ("README.txt",)


def classes(file: Path) -> list[tuple[str, str]]:
    """(folder, name) of the lines `n01440764 tench` of classnames.txt, by folder, which is the order of labels."""
    found = []
    for line in annotations.lines(file):
        folder, _, name = line.strip().partition(" ")
        if not name.strip():
            raise BadInput(f"{file}: {line[:60]!r} has no class name behind its folder. Use CoOp's classnames.txt.")
        found.append((folder, name.strip()))
    if len({folder for folder, _ in found}) < len(found):
        raise BadInput(f"{file}: a folder stands twice. Use CoOp's classnames.txt.")
    return sorted(found)


def names(listed: Sequence[tuple[str, str]]) -> list[str]:
    """A name of its own for each class, in the order given."""
    often = Counter(name for _, name in listed)
    return [name if often[name] == 1 else f"{name} ({folder})" for folder, name in listed]


def entries(root: Path, folder: str, labels: Mapping[str, int], named: Sequence[str]) -> Iterator[Entry]:
    """Entries of a folder of class folders, classes and files in the order of their names.

    Args:
        root: below which names of pictures stand.
        folder: below the root, of the class folders; empty for the root itself.
        labels: class folder -> its label; other folders are left alone.
        named: label -> class name.
    """
    for wnid in sorted(labels, key=lambda folder: labels[folder]):
        place = root / folder / wnid
        if not place.is_dir():
            continue
        for name in sorted(path.name for path in place.iterdir() if path.name not in HIDDEN):
            path = f"{folder}/{wnid}/{name}" if folder else f"{wnid}/{name}"
            yield Entry(path, [path], None, {"label": labels[wnid], "class_name": named[labels[wnid]], "folder": wnid})
