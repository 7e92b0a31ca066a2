"""Masked attention scores tile by tile, and what a gradient of a tile adds to queries and keys."""

# B batch, H heads, N query tokens, M key tokens, d width of a head, n x m one tile

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Scores of one tile over all B H heads. On a CPU a tile and its few companions stay in the cache; a GPU wants work.
TILE_ELEMENTS = {"cpu": 2**17, "other": 2**25}
TILE_ROWS = {"cpu": 64, "other": 256}
MIN_KEYS = 64


class ScoreTiles:
    """`scaling q k^T` with its masks, never whole.

    Args:
        q: (B, H, N, d), contiguous.
        k: (B, H, M, d), contiguous.
        mask: 4 dimensions, broadcastable to (B, H, N, M), bool with True = attend or a term added to the scores.
        causal: row i sees columns up to i + `offset`.
        offset: column that stands for row 0.
        tile: rows and columns of a tile; chosen by device when not given.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        causal: bool,
        offset: int,
        tile: tuple[int, int] | None,
    ):
        self.q, self.k, self.mask = q * scaling, k, mask
        self.scaling, self.causal, self.offset = scaling, causal, offset
        self.height, self.width = tile or default_tile(q.shape[0] * q.shape[1], q.device)
        self.dq = self.dk = None

    def rows(self) -> Iterator[slice]:
        """Blocks of rows, in order."""
        yield from _blocks(self.q.shape[-2], self.height)

    def columns(self, rows: slice) -> Iterator[slice]:
        """Blocks of columns that some row of the block sees."""
        seen = self.k.shape[-2]
        if self.causal:
            seen = min(seen, max(0, rows.stop + self.offset))
        yield from _blocks(seen, self.width)

    def scores(self, rows: slice, columns: slice) -> Tensor:
        """One tile, (B, H, n, m), -inf where a row does not see a column."""
        tile = self.q[..., rows, :] @ self.k[..., columns, :].mT
        if self.mask is not None:
            mask = _cut(_cut(self.mask, -2, rows), -1, columns)
            if mask.dtype == torch.bool:
                tile.masked_fill_(~mask, -math.inf)
            else:
                tile += mask
        if self.causal and columns.stop - 1 > rows.start + self.offset:
            ahead = torch.ones(tile.shape[-2:], dtype=torch.bool, device=tile.device)
            tile.masked_fill_(ahead.triu_(rows.start + self.offset - columns.start + 1), -math.inf)
        return tile

    def log_probabilities(self, rows: slice, columns: slice, lse: Tensor) -> Tensor:
        """Scores less their row's log-sum-exp, finite: what is masked becomes -1e6, whose exp is 0.

        `lse` (B, H, n, 2) holds the row maximum and the log of the sum apart: beside the least float, of which
        masks are made, the log would be lost.
        """
        return self.scores(rows, columns).sub_(lse[..., :1]).sub_(lse[..., 1:]).clamp_min_(-1e6)

    def softmax_parts(self, rows: slice) -> tuple[list[tuple[slice, Tensor]], Tensor, Tensor]:
        """All tiles of a block of rows as exp(score - row maximum), their row sums (B, H, n, 1), 1 where a row sees
        nothing, and the log-sum-exp (B, H, n, 2) in two parts, 0 there."""
        tiles = [(columns, self.scores(rows, columns)) for columns in self.columns(rows)]
        peak = self.floor(rows)
        for _, tile in tiles:
            peak = torch.maximum(peak, tile.amax(-1, keepdim=True))
        shift = finite(peak)
        total = torch.zeros_like(peak)
        for _, tile in tiles:
            total += tile.sub_(shift).exp_().sum(-1, keepdim=True)
        total = torch.where(total > 0, total, 1.0)
        return tiles, total, torch.cat([shift, total.log()], -1)

    def floor(self, rows: slice) -> Tensor:
        """-inf for each row of a block, (B, H, n, 1)."""
        return self.q.new_full((*self.q.shape[:2], rows.stop - rows.start, 1), -math.inf)

    def spread(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        """Add the gradient of one tile of scores to `dq` and `dk`."""
        if self.dq is None:
            self.dq, self.dk = torch.zeros_like(self.q), torch.zeros_like(self.k)
        self.dq[..., rows, :] += gradient @ self.k[..., columns, :]
        self.dk[..., columns, :] += gradient.mT @ self.q[..., rows, :]

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of q and k from all tiles spread so far."""
        if self.dq is None:
            return torch.zeros_like(self.q), torch.zeros_like(self.k)
        return self.dq * self.scaling, self.dk


def default_tile(heads: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile for B H `heads`."""
    kind = device.type if device.type in TILE_ROWS else "other"
    rows = TILE_ROWS[kind]
    return rows, max(MIN_KEYS, TILE_ELEMENTS[kind] // max(1, heads * rows))


def finite(x: Tensor) -> Tensor:
    """`x` with 0 in place of -inf."""
    return x.masked_fill(x == -math.inf, 0.0)


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _cut(mask: Tensor, dim: int, part: slice) -> Tensor:
    """The part of one dimension, where it is not broadcast."""
    if mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, part.start, part.stop - part.start)
