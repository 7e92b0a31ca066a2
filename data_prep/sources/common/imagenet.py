"""ImageNet's classes and folders, which several data sets share (specs/datasets.md 15).

A class is its folder: 1,000 folders have 998 names. The two pairs of equal names (missile, sunglasses) get their
folder after the name, since results could not tell them apart.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.sources.common import annotations
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from mmpeft_ds.errors import BadInput

HIDDEN = ("README.txt",)
_CLASS = re.compile(r"n?\d+")  # names of class folders: `n01440764`, and numbers in V2


def classes(file: Path) -> list[tuple[str, str]]:
    """(folder, name) of the lines `n01440764 tench` of classnames.txt, by folder, which is the order of labels."""
    named = []
    for line in annotations.lines(file):
        folder, _, name = line.strip().partition(" ")
        if not name.strip():
            raise BadInput(f"{file}: {line[:60]!r} has no class name after its folder. Use CoOp's classnames.txt.")
        named.append((folder, name.strip()))
    if len({folder for folder, _ in named}) < len(named):
        raise BadInput(f"{file}: a folder stands twice. Use CoOp's classnames.txt.")
    return sorted(named)


def names(listed: Sequence[tuple[str, str]]) -> list[str]:
    """A name of its own for each class, in the order given."""
    often = Counter(name for _, name in listed)
    return [name if often[name] == 1 else f"{name} ({folder})" for folder, name in listed]


def entries(
    root: Path, folder: str, split: str, index: Index, labels: Mapping[str, int], named: Sequence[str]
) -> Iterator[Entry]:
    """Entries of a folder of class folders, classes and files in the order of their names.

    Pictures in folders of no class are set aside, in a folder that other things lie in beside the class folders only
    those in folders that look like a class; classes without a folder are reported.

    Args:
        root: below which names of pictures stand.
        folder: below the root, of the class folders; empty for the root itself.
        labels: class folder -> its label.
        named: label -> class name.
    """
    there = {path.name for path in (root / folder).iterdir() if path.is_dir()}
    if without := [wnid for wnid in labels if wnid not in there]:
        shown = ", ".join(sorted(without)[:3]) + (", ..." if len(without) > 3 else "")
        print(f"note: {split}: {len(without)} of {len(labels)} classes have no folder: {shown}", file=sys.stderr)
    unknown = (name for name in there - labels.keys() if not name.startswith("."))
    strange = sorted(name for name in unknown if folder or _CLASS.fullmatch(name))
    for wnid in (*sorted(labels.keys() & there, key=lambda name: labels[name]), *strange):
        for name in sorted(path.name for path in (root / folder / wnid).iterdir() if path.name not in HIDDEN):
            path = f"{folder}/{wnid}/{name}" if folder else f"{wnid}/{name}"
            if wnid not in labels:
                index.set_aside(split, "folder of no class", path)
                continue
            yield Entry(path, [path], None, {"label": labels[wnid], "class_name": named[labels[wnid]], "folder": wnid})
