"""The k most similar samples of each row, without the matrix of all similarities."""

# B own rows, n rows of a block of columns, D feature width, K candidates kept for a row

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft_ds.host_copies import surely_all
from mmpeft_ds.ops.similarity_graph import Rows, cosines_at, decided_tiles, default_chunk, margin, products

# Similarities held at a time where both ends of a pair look for candidates: 512 rows on a CPU. In columns that are
# shorter than 64 times the candidates torch takes twice as long to find them.
_CHUNK_OF_BOTH_ENDS = {"cpu": 2**20}
# Candidates beyond k: nearly equal ones are told apart by their exact cosine, without a second pass. With the papers'
# k of 5 these make 8, of which torch finds the largest of 512 in half the time that one more would take.
SPARE = 3


@dataclass
class Nearest:
    """Best hits of B rows, by descending cosine (to within `margin` unless exact), equal cosines by ascending key.

    Attributes:
        position: (B, k) int64, -1 where there are fewer than k.
        cosine: (B, k) float64, -inf there; `cosines` where that decides something, else to within `margin`.
        key: (B, k) int64, the key of each hit: the number that `nearest` was given for that row.
    """

    position: Tensor
    cosine: Tensor
    key: Tensor

    def merge(self, other: Nearest) -> Nearest:
        """The best of two blocks; both must have been found with `exact`."""
        joined = Nearest(*(torch.cat(pair, 1) for pair in zip(self._columns(), other._columns(), strict=True)))
        return joined._best(self.position.shape[1])

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.position, self.cosine, self.key

    def _best(self, k: int) -> Nearest:
        order = _by_cosine_then_key(self.cosine, self.key)[:, :k]
        return Nearest(*(column.gather(1, order) for column in self._columns()))

    def _first(self, k: int) -> Nearest:
        return Nearest(*(column[:, :k] for column in self._columns()))


def nearest(
    own: Rows,
    block: Rows,
    keys: Tensor,
    k: int,
    *,
    tau: float | None = None,
    with_self: bool = False,
    exact: bool = False,
    chunk: int | None = None,
) -> Nearest:
    """The k rows of a block that are most similar to each own row. Memory O(B k + chunk).

    Which rows are chosen depends on their exact cosines and keys alone: not on the size of a tile, nor on the order
    of the block. Only rows whose candidates are too close to call in float32 are looked at again.

    Args:
        own, block: rows with their positions.
        keys: (n,) int64, one for each row of the block; of equal cosines the smaller key comes first.
        k: hits of a row.
        tau: if given, the cosines that are returned lie on the right side of it.
        with_self: a row may be its own hit.
        exact: all returned cosines are exact, so that blocks can be merged.
        chunk: similarities to hold at a time; None = by device.

    Source: GA-Net, arXiv 2408.00290 (journal version), an exact inner-product search.
    """
    chunk = chunk or default_chunk(own.raw.device)
    if not len(own) or not len(block):
        nothing = torch.full((len(own), k), -1, dtype=torch.int64, device=own.raw.device)
        return Nearest(nothing, torch.full_like(nothing, -math.inf, dtype=torch.float64), torch.zeros_like(nothing))
    kept = k + SPARE
    parts = []
    for part in _blocks(len(own), math.isqrt(chunk // 4)):
        best = _candidates(own[part], block, kept, with_self, chunk)
        options = {"tau": tau, "with_self": with_self, "exact": exact, "chunk": chunk}
        parts.append(settled(own[part], block, keys, k, *best, **options))
    if len(parts) == 1:
        return parts[0]
    return Nearest(*(torch.cat(columns) for columns in zip(*(part._columns() for part in parts), strict=True)))


def shared_candidates(
    own: Rows, everyone: Rows, k: int, *, with_self: bool = False, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates from one rank's half of the similarities, for its own rows and for all.

    Every pair is computed by one rank, for both of its ends. The best of what all ranks found for a row, as `settled`
    takes them, are those of a search through everything.

    Args:
        own, everyone: B and M rows with their positions.
        k, with_self, chunk: as for `nearest`.

    Returns:
        values (B, k + SPARE) and columns (B, k + SPARE) int64 of own rows; values and columns (M, k + SPARE) of all
        rows; -inf where there are fewer.
    """
    kept, total = k + SPARE, len(everyone)
    values, columns = _none(own, len(own), kept)
    values_of_all, columns_of_all = _none(own, total, kept)
    chunk = chunk or _CHUNK_OF_BOTH_ENDS.get(own.raw.device.type)
    for rows, block, decided in decided_tiles(own, everyone, total, chunk):
        tile = products(rows, block)
        if decided is not True:
            tile.masked_fill_(~decided, -math.inf)
        here = slice(rows.start - own.start, rows.start - own.start + len(rows))
        _take(values, columns, here, tile, block.start)
        _take(values_of_all, columns_of_all, slice(block.start, block.start + len(block)), tile.mT, rows.start)
    if with_self and len(own):
        mine = torch.arange(own.start, own.start + len(own), device=values.device)[:, None]
        values, columns = best_of([values, (own.scale > 0).to(values.dtype)], [columns, mine], kept)
    return values, columns, values_of_all, columns_of_all


def best_of(values: list[Tensor], columns: list[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    """The `kept` largest of several lists of candidates for the same rows."""
    best, order = torch.cat(values, 1).topk(kept)
    return best, torch.cat(columns, 1).gather(1, order)


def settled(
    own: Rows,
    block: Rows,
    keys: Tensor,
    k: int,
    values: Tensor,
    columns: Tensor,
    *,
    tau: float | None = None,
    with_self: bool = False,
    exact: bool = False,
    chunk: int | None = None,
) -> Nearest:
    """The k best of the k + SPARE candidates with the largest products, decided by exact cosines and keys.

    Args:
        values, columns: (B, k + SPARE) products of unit rows, -inf where there is no hit, and columns of the block.
        others: as for `nearest`.
    """
    near = 2 * margin(own)
    if tau is None and not with_self and not exact and values.shape[1] > k:
        # candidates come by descending product: no two that decide anything are near each other
        steps = values[:, : k + 1].diff()
        if surely_all(steps < 0) and surely_all(steps[:, -1] < -near):
            columns = columns[:, :k]
            return Nearest(columns + block.start, values[:, :k].double(), keys[columns])
    cosine = values.double()
    missing = values == -math.inf
    last = values[:, k - 1 : k]
    # Exact where the k-th and the one after it cannot be told apart; or the two first, of which a search drops one.
    # Candidates that are further away stay on their side of them.
    needed = _close(last, values[:, k : k + 1], near)[:, None] & ((values - last).abs() <= near)
    if with_self:
        first = values[:, :1]
        needed |= _close(first, values[:, 1:2], near)[:, None] & ((values - first).abs() <= near)
    if tau is not None:
        needed |= (values - tau).abs() <= near
    row, slot = needed.nonzero(as_tuple=True)
    if len(row):
        cosine[row, slot] = cosines_at(own, block, row, columns[row, slot])
    nearest = Nearest(torch.where(missing, -1, columns + block.start), cosine, torch.where(missing, 0, keys[columns]))
    # candidates come by descending product: without exact cosines and equal products they are in order
    ordered = not len(row) and surely_all(values[:, :k].diff() < 0)
    nearest = nearest._first(k) if ordered else nearest._best(k)
    # so many nearly equal that some may not be among the candidates
    if len(row) and len(block) > values.shape[1]:
        crowded = _close(last, values[:, -1:], near).nonzero().flatten()
        step = max(1, (chunk or default_chunk(values.device)) // len(block))
        for some in crowded.split(step) if len(crowded) else ():
            again = _all_of_rows(own, some, block, keys, k, last[some] - near, with_self)
            for mine, new in zip(nearest._columns(), again._columns(), strict=True):
                mine[some] = new
    if exact:
        row, slot = (nearest.position >= 0).nonzero(as_tuple=True)
        nearest.cosine[row, slot] = cosines_at(own, block, row, nearest.position[row, slot] - block.start)
        nearest = nearest._best(k)
    return nearest


def _none(like: Rows, rows: int, kept: int) -> tuple[Tensor, Tensor]:
    """Lists without candidates."""
    values = like.values.new_full((rows, kept), -math.inf)
    return values, torch.zeros(rows, kept, dtype=torch.int64, device=values.device)


def _take(values: Tensor, columns: Tensor, rows: slice, tile: Tensor, start: int) -> None:
    """Put the best of a tile into the lists of its rows, in place."""
    kept = values.shape[1]
    best, at = tile.topk(min(kept, tile.shape[1]))
    values[rows], columns[rows] = best_of([values[rows], best], [columns[rows], at + start], kept)


def _candidates(own: Rows, block: Rows, kept: int, with_self: bool, chunk: int) -> tuple[Tensor, Tensor]:
    """The `kept` largest products of each row and their columns."""
    parts = _blocks(len(block), max(1, chunk // len(own)))
    if len(parts) == 1 and len(block) >= kept:
        return _without_self(products(own, block), own, block, with_self).topk(kept)
    values, columns = _none(own, len(own), kept)
    for part in parts:
        tile = _without_self(products(own, block[part]), own, block[part], with_self)
        _take(values, columns, slice(0, len(own)), tile, part.start)
    return values, columns


def _without_self(tile: Tensor, own: Rows, block: Rows, with_self: bool) -> Tensor:
    if not with_self:
        first, end = max(own.start, block.start), min(own.start + len(own), block.start + len(block))
        if first < end:
            shared = tile[first - own.start : end - own.start, first - block.start : end - block.start]
            shared.diagonal().fill_(-math.inf)
    return tile


def _all_of_rows(
    own: Rows, rows: Tensor, block: Rows, keys: Tensor, k: int, floor: Tensor, with_self: bool
) -> Nearest:
    """Like `nearest`, from the exact cosines of everything above `floor`, (rows, 1)."""
    some = Rows(own.raw[rows], own.values[rows], own.scale[rows], -1)
    tile = products(some, block)
    inside = rows + own.start - block.start
    mine = (inside >= 0) & (inside < len(block))
    if not with_self:
        tile[mine.nonzero().flatten(), inside[mine]] = -math.inf
    row, column = (tile >= floor).nonzero(as_tuple=True)
    cosine = torch.full(tile.shape, -math.inf, dtype=torch.float64, device=tile.device)
    cosine[row, column] = cosines_at(some, block, row, column)
    position = torch.arange(block.start, block.start + len(block), device=tile.device).expand(tile.shape)
    nearest = Nearest(position, cosine, keys.expand(tile.shape))._best(k)
    return Nearest(torch.where(nearest.cosine == -math.inf, -1, nearest.position), nearest.cosine, nearest.key)


def _by_cosine_then_key(cosine: Tensor, key: Tensor) -> Tensor:
    by_key = key.argsort(dim=1, stable=True)
    return by_key.gather(1, cosine.gather(1, by_key).argsort(dim=1, descending=True, stable=True))


def _close(a: Tensor, b: Tensor, near: float) -> Tensor:
    """(B,) bool, whether two columns of candidates, both there, differ by at most `near`."""
    if not b.shape[1]:
        return torch.zeros(len(a), dtype=torch.bool, device=a.device)
    return ((a - b).abs() <= near).flatten()


def _blocks(length: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
