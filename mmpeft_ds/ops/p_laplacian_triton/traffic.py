"""Bytes that a launch of a p-Laplacian kernel reads and writes, by its grid and blocks.

The model: every program loads and stores what its code names, once each time the code names it, inside of the tensors
only. What the caches keep is not taken off, so a card's memory moves at most this, and less where programs of one head
run side by side. Tests compare it with the loads and stores of the interpreter.
"""

# R rows and C columns of a tile that lie inside of the graph

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmpeft_ds.ops.p_laplacian_triton.tiles import ADDED, KEEP, KEEP_KEYS

FLOAT = 4


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: its name.
        by_columns: a program takes a block of columns, not of rows.
        heads: B H.
        options: what the kernel was called with, by name.
        item: bytes of an element of q and k; `mask_item` of the mask.
    """

    kernel: str
    by_columns: bool
    heads: int
    options: dict[str, Any]
    item: int
    mask_item: int

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["options"].get(name, 0)

    def bytes(self) -> int:
        """Read and written by all programs."""
        total = 0
        once, tile = _ONCE[self.kernel], _TILE[self.kernel]
        for block, tiles in self._programs():
            R, C = (0, block) if self.by_columns else (block, 0)
            total += once(self, R, C) + sum(tile(self, *pair) for pair in tiles)
        return total * self.heads

    def _programs(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """For each block, its length and the (R, C) of the tiles that it runs over."""
        n, m, N, M = self.n, self.m, self.N, self.M
        if self.by_columns:
            for start in range(0, M, m):
                columns = min(m, M - start)
                first = max(0, start - self.offset) // n * n if self.CAUSAL else 0
                yield columns, [(min(n, N - at), columns) for at in range(first, N, n)]
            return
        for start in range(0, N, n):
            rows = min(n, N - start)
            seen = max(0, min(M, start + n + self.offset)) if self.CAUSAL else M
            yield rows, [(rows, min(m, M - at)) for at in range(0, seen, m)]


def _mask(x: Launch, R: int, C: int) -> int:
    kind = x.MASK
    if kind == KEEP_KEYS.value:
        return C * x.mask_item
    # Under a causal mask this counts the whole tile where it is cut by the diagonal.
    return R * C * x.mask_item if kind in (KEEP.value, ADDED.value) else 0


def _probabilities(x: Launch, R: int, C: int) -> int:
    """A tile of the map: from the keys or queries that come with it, the mask, and normalisers of rows that come; or
    read."""
    if x.POOLED:
        return R * C * FLOAT
    moving = R if x.by_columns else C
    return moving * x.D * x.item + _mask(x, R, C) + x.by_columns * 2 * R * FLOAT


def _channels(x: Launch, R: int, C: int) -> int:
    """One channel after the other of both kinds of nodes."""
    return x.B * (R + C) * FLOAT


def _fixed(x: Launch, R: int, C: int) -> int:
    """The block's own queries and their normalisers, or its own keys."""
    return 0 if x.POOLED else (R + C) * x.D * x.item + 2 * R * FLOAT


_ONCE = {
    "row_lse": lambda x, R, C: _fixed(x, R, C),  # it writes the normalisers
    "column_sums": lambda x, R, C: _fixed(x, R, C) + C * FLOAT,
    "pooled_map": lambda x, R, C: _fixed(x, R, C) + R * x.G * FLOAT,
    "messages": lambda x, R, C: _fixed(x, R, C) + (2 + 2 * R * x.B + 2 * R) * FLOAT,
    "edge_rows": lambda x, R, C: (
        _fixed(x, R, C)
        + (2 + R * x.B + 2 * R) * FLOAT
        + (R * x.B + 1 + R * (x.EXACT or x.POOLED)) * FLOAT
        + x.SCORES * (R * (not x.EXACT) + R * x.D) * FLOAT
    ),
    "edge_columns": lambda x, R, C: _fixed(x, R, C) + (2 + 2 * C * x.B + x.SCORES * C * x.D) * FLOAT,
    "map_rows": lambda x, R, C: _fixed(x, R, C) + (R + R * x.D) * FLOAT,
    "map_columns": lambda x, R, C: _fixed(x, R, C) + C * x.D * FLOAT,
}
_TILE = {
    "row_lse": lambda x, R, C: C * x.D * x.item + _mask(x, R, C),
    "column_sums": _probabilities,
    "pooled_map": lambda x, R, C: _probabilities(x, R, C) + C * x.G * FLOAT,
    # value nodes once more for a product
    "messages": lambda x, R, C: _probabilities(x, R, C) + _channels(x, R, C) + C * x.B * FLOAT,
    "edge_rows": lambda x, R, C: (
        _probabilities(x, R, C) + 2 * _channels(x, R, C) + C * x.B * FLOAT + x.POOLED * R * C * FLOAT
    ),
    "edge_columns": lambda x, R, C: (
        _probabilities(x, R, C) + 2 * _channels(x, R, C) + (R * x.B + 2 * R + x.SCORES * R) * FLOAT
    ),
    # Without a factor of the rows there are two sweeps, of which the first finds E.
    "map_rows": lambda x, R, C: (_probabilities(x, R, C) + (x.R * (R + C) or C) * FLOAT) * (1 if x.R else 2),
    "map_columns": lambda x, R, C: _probabilities(x, R, C) + (x.R * (R + C) or C) * FLOAT + R * FLOAT,
}
