"""Pictures of a split that other splits have too, by the hash of their bytes as they are stored."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft_ds.data import identity
from mmpeft_ds.data.parts import Part
from mmpeft_ds.data.shards import members

SHOWN = 10  # names kept


def across_splits(out: Path, parts: dict[str, list[Part]]) -> dict[str, dict[str, Any]]:
    """Pictures of each split that splits after it have too.

    Args:
        out: directory of the shards, which are all in place.
        parts: split -> parts of its shards in order.

    Returns:
        split -> {`also_in`: later split -> [number of different pictures, the source's names of the first ten samples
        of the former that show one]}; without splits that have none.
    """
    duplicates: dict[str, dict[str, Any]] = {}
    for split, other in itertools.combinations(parts, 2):
        if common := _common(parts[split], parts[other]):
            number, places = common
            names = [name_of(out, parts[split][shard], sample) for shard, sample in places]
            duplicates.setdefault(split, {"also_in": {}})["also_in"][other] = [number, names]
    return duplicates


def _common(mine: list[Part], theirs: list[Part]) -> tuple[int, list[tuple[int, int]]] | None:
    """(number of different pictures in both, (shard, sample) of the first of mine that show them), or None."""
    total, places = 0, []
    for here in identity.passes(_blocks(theirs), "pictures"):
        held = np.unique(np.concatenate([here(block["pictures"]) for block in _blocks(theirs)()]))
        left = np.ones(len(held), dtype=bool)  # not met yet
        for shard, block in enumerate(_blocks(mine)()):
            pictures = block["pictures"]
            at = np.minimum(np.searchsorted(held, pictures), max(len(held) - 1, 0))
            hits = np.flatnonzero(held[at] == pictures) if len(held) else np.zeros(0, dtype=np.int64)
            # The first of those that are equal, and only if no shard before had it.
            _, first = np.unique(at[hits], return_index=True)
            hits = np.sort(hits[first])
            hits = hits[left[at[hits]]]
            left[at[hits]] = False
            total += len(hits)
            owners = np.repeat(np.arange(len(block["picture_counts"])), block["picture_counts"])
            # A sample with several pictures may hold several of them.
            samples = np.unique(owners[hits])[:SHOWN].tolist()
            places = sorted({*places, *((shard, sample) for sample in samples)})[:SHOWN]
    return (total, places) if total else None


def _blocks(parts: list[Part]) -> Callable[[], Iterator[identity.Arrays]]:
    return lambda: (part.arrays() for part in parts)


def name_of(out: Path, part: Part, sample: int) -> str:
    """The source's own name of a sample."""
    begin, length = part.offsets[sample].tolist()
    with open(out / part.shard.file, "rb") as stream:
        stream.seek(begin)
        _, parts = members(stream.read(length))
    return str(json.loads(parts["json"])["source_name"])
