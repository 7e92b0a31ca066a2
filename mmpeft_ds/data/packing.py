"""Search for the samples that keep a batch from being packed, alone or together with usual ones."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from mmpeft_ds.errors import BadSample

# What functions that make tensors of given data raise where the data do not fit: nearly anything.
REFUSALS = (Exception,)
JURY = 8  # items that are compared with each other

Item = TypeVar("Item")
Made = TypeVar("Made")


def spread(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(shard, sample) of JURY samples from all over shards of these sizes, or of all where there are fewer."""
    ends, total = list(itertools.accumulate(sizes)), sum(sizes)
    chosen = range(0, total, max(1, -(-total // JURY)))
    shards = [bisect.bisect_right(ends, position) for position in chosen]
    return [(shard, position - ends[shard] + sizes[shard]) for shard, position in zip(shards, chosen, strict=True)]


def make_of_most(
    items: Sequence[Item], make: Callable[[list[Item]], Made], usual: Callable[[], Sequence[Item]] | None = None
) -> tuple[Made | None, list[int]]:
    """Result of `make` for the items that it does not refuse, None if none is left, and the indices of the refused
    ones.

    See `refused`.

    Raises:
        what `make` raises, where it works with none of the items.
    """
    try:
        return make(list(items)), []
    except REFUSALS:
        out = refused(items, make, usual)
        if out is None:
            raise
    left = [item for i, item in enumerate(items) if i not in out]
    return (make(left) if left else None), out


def refused(
    items: Sequence[Item], make: Callable[[list[Item]], object], usual: Callable[[], Sequence[Item]] | None = None
) -> list[int] | None:
    """The items without which `make` works, called after it has failed with all of them.

    An item that fails alone is one. Of items that fail only together, those are that do not go with the larger group
    of `usual`, or of the items themselves; should all go with it in pairs, those that are one too many.

    Args:
        make: makes something of a list of items, or raises one of REFUSALS.
        usual: gives items that stand for the data as a whole, so that the answer does not depend on the batch.

    Returns:
        their indices; None where nothing works even alone, so that the fault is not an item's. A BadSample is always
        an item's.
    """
    alone = [refusal(make, item) for item in items]
    left = [i for i, error in enumerate(alone) if error is None]
    if not left and all(isinstance(error, BadSample) for error in alone):
        return list(range(len(items)))
    jury = [item for item in (usual() if usual else ()) if _works(make, [item])]
    if not left and not jury:
        return None
    jury = jury or [items[i] for i in left[:: -(-len(left) // JURY)]]
    group = _largest_group(jury, make)
    left = [i for i in left if all(_works(make, [items[i], one]) for one in group)]
    if left and not _works(make, [items[i] for i in left]):
        kept: list[int] = []
        for i in left:
            if _works(make, [items[k] for k in (*kept, i)]):
                kept.append(i)
        left = kept
    return [i for i in range(len(items)) if i not in left]


def refusal(make: Callable[[list[Item]], object], item: Item) -> Exception | None:
    """Reason why `make` refuses an item alone; None if it does not."""
    try:
        make([item])
    except REFUSALS as error:
        return error
    return None


def _largest_group(items: Sequence[Item], make: Callable[[list[Item]], object]) -> list[Item]:
    """The most items that go together in pairs, the first ones where several groups are as large. An item that goes
    with all others belongs to every group."""
    pairs = {(i, k): _works(make, [items[i], items[k]]) for k in range(len(items)) for i in range(k)}
    choosy = sorted({i for pair, works in pairs.items() if not works for i in pair})
    groups: list[list[int]] = []
    for i in choosy:
        fitting = [group for group in groups if all(pairs[k, i] for k in group)]
        if fitting:
            fitting[0].append(i)
        else:
            groups.append([i])
    chosen = max(groups, key=len, default=[])
    return [item for i, item in enumerate(items) if i in chosen or i not in choosy]


def _works(make: Callable[[list[Item]], object], items: list[Item]) -> bool:
    try:
        make(items)
    except REFUSALS:
        return False
    return True
