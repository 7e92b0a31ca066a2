"""Pictures that are equal but for details: small changes of size, place or shade of one drawing.

The same pairs come out on every machine: what decides are sums of whole numbers.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

SIDE = 16  # pixels of what is compared
BLOCK = 1024  # rows of the table of all pairs that are in memory at a time


def ink(picture: bytes) -> np.ndarray:
    """A drawing on white, inverted and coarse: (SIDE * SIDE * 3,) uint8, 0 where the picture is white."""
    with Image.open(io.BytesIO(picture)) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return 255 - np.asarray(small, dtype=np.uint8).reshape(-1)


def pairs(inks: np.ndarray, cosine: float) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, whose `ink` has at least this cosine.

    Args:
        inks: (N, SIDE * SIDE * 3), none of them all zero.
    """
    values = inks.astype(np.float64)  # products and sums stay below 2**53: exact in any order
    squares = (values * values).sum(1)
    for first in range(0, len(values), BLOCK):
        block = slice(first, first + BLOCK)
        products = values[block] @ values[first:].T
        equal = products * products >= cosine * cosine * squares[block, None] * squares[None, first:]
        for i, j in zip(*np.nonzero(np.triu(equal, 1)), strict=True):
            yield first + int(i), first + int(j)


def groups(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` items the first one that it is linked to, directly or through others; itself if there is
    none."""
    first = list(range(count))

    def root(item: int) -> int:
        while first[item] != item:
            first[item] = first[first[item]]
            item = first[item]
        return item

    for a, b in links:
        low, high = sorted((root(a), root(b)))
        first[high] = low
    return [root(item) for item in range(count)]
