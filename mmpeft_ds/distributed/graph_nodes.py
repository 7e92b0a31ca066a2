"""The rows of all ranks that a graph joins: how many there are, where they stand, and how they get to a rank."""

# B rows of this rank, V valid rows of all ranks, D feature width

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.counters import Traffic, counted
from mmpeft_ds.distributed.gather import gather_rows, gather_sizes
from mmpeft_ds.distributed.ring import ring_blocks
from mmpeft_ds.host_copies import nonzero, on_host
from mmpeft_ds.ops.similarity_graph import Rows

# Bytes of the features of all ranks up to which they travel in one message with their keys and places.
ONE_MESSAGE = 2**24
# Multiplications of a rank's rows with all rows up to which computing every pair on both of its ranks takes less time
# than a message.
FEW_PRODUCTS = 2**30
# Multiplications of all rows with all rows up to which each rank finds the edges of all.
WHOLE_PRODUCTS = 2**25


class Nodes:
    """The valid rows of all ranks, numbered through. Making them is collective.

    Args:
        x: (B, D) features of this rank.
        valid: (B,) bool, which of them take part; None = all.
        key: (B,) int64, stable ids; None = positions.
        counts: B of every rank, where known.
        group: the ranks.
        exchange: `gather` or `ring`.

    Attributes:
        x: (V of this rank, D) own valid rows.
        counts, shares: rows, and valid rows, of every rank.
        all_valid: whether every row of every rank is.
        positions: (V,) int64, of the valid rows among all rows.
        keys: (V,) int64, their ids.
        offset, start: positions of the first own row among all rows, and of the first own valid one among valid ones.
        traffic: collectives so far.
    """

    def __init__(
        self,
        x: Tensor,
        valid: Tensor | None,
        key: Tensor | None,
        counts: list[int] | None,
        group: Any,
        exchange: str,
    ):
        self.traffic, self.group = Traffic(), group
        kept = len(x) if valid is None else int(on_host(valid).sum())
        self.valid = torch.ones(len(x), dtype=torch.bool, device=x.device) if valid is None else valid
        own = slice(None) if kept == len(x) else nonzero(self.valid, kept)[:, 0]
        self.x = x.detach()[own]
        with counted(self.traffic):
            if counts is None or valid is not None:  # the numbers of valid rows come along, so that none is read later
                sizes = gather_sizes([len(x), kept], x.device, group)
                self.counts, self.shares = ([row[at] for row in sizes] for at in (0, 1))
            else:
                self.counts = self.shares = counts
            self.all_valid = self.counts == self.shares
            columns = [] if self.all_valid else [torch.arange(len(x), device=x.device)[own]]
            columns += [] if key is None else [key[own]]
            everyone = self._gathered(columns, exchange)
        if self.all_valid:
            self.positions = torch.arange(sum(self.counts), device=x.device)
        else:
            firsts = [sum(self.counts[:rank]) for rank in range(len(self.counts))]
            starts = [everyone[0].new_full((n,), first) for n, first in zip(self.shares, firsts, strict=True)]
            self.positions = everyone[0] + torch.cat(starts)
        self.keys = self.positions if key is None else everyone[-1]
        rank = collectives.rank(group)
        self.offset, self.start = sum(self.counts[:rank]), sum(self.shares[:rank])

    def _gathered(self, columns: list[Tensor], exchange: str) -> list[Tensor]:
        """Numbers (B,) int64 of own valid rows -> (V,) of those of all ranks. Features come along where they are
        small: a message costs more than its bytes then. Collective."""
        self._everyone, width = None, self.x.shape[1] * self.x.element_size()
        if not columns or collectives.world_size(self.group) == 1:
            return columns
        parts = [column[:, None].contiguous().view(torch.uint8) for column in columns]
        if exchange == "gather" and sum(self.shares) * width <= ONE_MESSAGE:
            parts.append(_as(torch.uint8, self.x))
        packed = gather_rows(torch.cat(parts, 1), self.shares, self.group)
        if len(parts) > len(columns):
            self._everyone = _as(self.x.dtype, packed[:, 8 * len(columns) :])
        return [_dense(packed[:, 8 * i : 8 * i + 8]).view(torch.int64)[:, 0] for i in range(len(columns))]

    def finds_all(self, exchange: str) -> bool:
        """Whether each rank finds the edges of all rows by itself: of few rows in less time than a second message
        takes, and alone in any case, up to where every pair is better computed once."""
        several = collectives.world_size(self.group) > 1
        if several and exchange == "ring":
            return False
        return self._products() <= (WHOLE_PRODUCTS if several else FEW_PRODUCTS)

    def computes_twice(self, exchange: str) -> bool:
        """Whether each rank computes the similarities of its rows with all, also those that another rank computes for
        its own."""
        ranks = collectives.world_size(self.group)
        return exchange == "gather" and ranks > 1 and self._products() <= FEW_PRODUCTS * ranks

    def _products(self) -> int:
        """Multiplications of all valid rows with all."""
        return sum(self.shares) ** 2 * self.x.shape[1]

    def blocks(self, exchange: str) -> Iterator[tuple[Rows, Rows]]:
        """Own rows and those of all, at once or rank by rank. Collective."""
        if exchange == "gather" or collectives.world_size(self.group) == 1:
            if self._everyone is None:
                self._everyone = gather_rows(self.x, self.shares, self.group)
            everyone = Rows.of(self._everyone)
            yield everyone[self.start : self.start + len(self.x)], everyone
        else:
            own = Rows.of(self.x, self.start)
            for rank, rows in ring_blocks(self.x, self.shares, self.group):
                yield own, Rows.of(rows, sum(self.shares[:rank]))


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Rows whose bytes are read as another dtype, without a copy where torch allows it."""
    usual = min(x.shape) > 1 and x.stride(1) == 1 and x.stride(0) * x.element_size() % dtype.itemsize == 0
    return (x if usual else _dense(x)).view(dtype)


def _dense(x: Tensor) -> Tensor:
    """A copy whose strides a view of another dtype takes; `contiguous` leaves any stride to a dimension of size 1."""
    return x.clone(memory_format=torch.contiguous_format)
