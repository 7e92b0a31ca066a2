"""Cosine similarity between samples, and which pairs of them a threshold makes neighbours. No gradient anywhere."""

# B own rows, n rows of a block of columns, M all rows, D feature width, P pairs

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft_ds.host_copies import surely_all, to_device
from mmpeft_ds.ops import bits as packed
from mmpeft_ds.ops.precision import at_least_float32

# Similarities held at a time. On a CPU a tile stays in the cache; a GPU wants work.
CHUNK = {"cpu": 2**18, "other": 2**25}
# Values of the pairs that are computed again at a time.
_PAIR_VALUES = {"cpu": 2**17, "other": 2**24}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Matrix products keep all bits of float32: no TF32, no bfloat16 passes, no autocast, whatever is set outside."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    cast = any(map(torch.is_autocast_enabled, ("cuda", "cpu")))
    if not cast and set(before) <= {"ieee", "none"}:  # four settings take as long as a small product
        yield
        return
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        try:
            for setting in settings:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                setting.fp32_precision = value


def unit_rows(x: Tensor) -> Tensor:
    """(n, D) rows of length 1, float32 or float64; a row of zeros, or one that is not finite, becomes zeros."""
    x = at_least_float32(x.detach())
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    usable = (length > 0) & length.isfinite()
    unit = x / torch.where(usable, length, 1.0)
    return unit if surely_all(usable) else unit.masked_fill_(~usable, 0.0)


def unit_parts(parts: list[Tensor]) -> Tensor:
    """Modalities (n, Di) side by side, each of length 1: (n, sum of Di).

    The cosine of two such rows is the mean of the modalities' cosines, so the modality with larger norms does not
    decide alone. A modality that a sample lacks is a row of zeros.

    Source: GA-Net, arXiv 2408.00290, whose released code compares the plain concatenation.
    """
    return torch.cat([unit_rows(part) for part in parts], 1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of rows of (P, D) and (P, D), float64 (P,), the same bits wherever the pair stands.

    The value does not depend on other pairs nor on the order of the two, unlike an entry of a matrix product. Equal
    rows give exactly 1, and rows of small integers the nearest float64 to their cosine. 0 where a row is zero or not
    finite.
    """
    on_cpu = a.device.type == "cpu"
    if on_cpu and len(a) == 1:  # torch adds up a single wide row in parts, one of each thread
        return cosines(a.expand(2, -1), b.expand(2, -1))[:1]
    a, b = a.detach().double(), b.detach().double()
    if on_cpu:
        aa, bb, ab = (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)
    else:
        aa, bb, ab = sums_by_halves(torch.cat([a * a, b * b, a * b])).chunk(3)
    length = (aa * bb).sqrt()
    usable = (length > 0) & length.isfinite()
    return torch.where(usable, ab / torch.where(usable, length, 1.0), 0.0)


def sums_by_halves(x: Tensor) -> Tensor:
    """(n,) sums of the rows of (n, D), with the same bits for any n and on any device.

    The two halves of a row are added up, then those of the result. A sum of CUDA's is divided among threads and blocks
    by the number of rows and their width, so equal pairs of few rows, or of wide ones, may differ in their last bit.
    """
    while (width := x.shape[1]) > 1:
        half = (width + 1) // 2
        x = torch.cat([x[:, : width - half] + x[:, half:], x[:, width - half : half]], 1)
    return x.sum(1)


@dataclass
class Rows:
    """Samples to compare.

    Attributes:
        raw: (n, D) in their own dtype.
        values: (n, D) the same in float32 (float64 stays), zeros where a row is not finite.
        scale: (n, 1) one over their lengths, 0 for a row of zeros. Products are scaled, not rows: there are fewer.
        start: position of the first among all.
    """

    raw: Tensor
    values: Tensor
    scale: Tensor
    start: int

    @classmethod
    def of(cls, raw: Tensor, start: int = 0) -> Rows:
        """Rows, not yet of length 1, whose first stands at position `start` among all M."""
        raw = raw.detach()
        values = at_least_float32(raw)
        length = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        if not surely_all(length.isfinite()):
            values = values.masked_fill(~length.isfinite(), 0.0)
            length = length.masked_fill(~length.isfinite(), 0.0)
        return cls(raw, values, length.reciprocal().masked_fill_(length == 0, 0.0), start)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, part: slice) -> Rows:
        start = self.start + part.indices(len(self))[0]
        return Rows(self.raw[part], self.values[part], self.scale[part], start)


def margin(rows: Rows) -> float:
    """Largest distance of an entry of `products` from the cosine: four standard deviations of its rounding, at
    worst."""
    return math.sqrt(max(64, rows.values.shape[1])) * torch.finfo(rows.values.dtype).eps


def products(own: Rows, block: Rows) -> Tensor:
    """Cosines of all pairs to within `margin`, (B, n)."""
    with exact_float32():
        return (own.values @ block.values.mT).mul_(own.scale).mul_(block.scale.mT)


def above(own: Rows, block: Rows, tau: float) -> Tensor:
    """Pairs of a tile whose cosine is strictly above `tau`: (B, n) bool.

    A product of matrices rounds differently in tiles of different shapes, so pairs within `margin` of `tau` are
    decided by `cosines`: the answer for a pair is the same in any tile and on any rank.
    """
    excess = products(own, block).sub_(tau)
    mask = excess > 0
    # The host waits for their number. To compute all pairs in float64 instead would take a GPU many times as long.
    close = (excess.abs_() <= margin(own)).nonzero(as_tuple=True)
    if len(close[0]):
        mask[close] = cosines_at(own, block, *close) > tau
    return mask


def cosines_at(own: Rows, block: Rows, row: Tensor, column: Tensor) -> Tensor:
    """`cosines` of the pairs (row, column), (P,)."""
    out = torch.empty(len(row), dtype=torch.float64, device=row.device)
    step = max(1, _by_device(_PAIR_VALUES, out.device) // max(1, own.raw.shape[1]))
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        out[part] = cosines(own.raw[row[part]], block.raw[column[part]])
    return out


def default_chunk(device: torch.device) -> int:
    """Similarities to hold at a time on a device."""
    return _by_device(CHUNK, device)


def _by_device(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["other"])


# ------------------------------------------------------------------------------------------------ threshold graph


def edges_above(everyone: Rows, own: slice, tau: float, chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The graph of pairs above `tau` from all similarities; as `decide_pairs` and `symmetric_edges` find it in halves.

    A pair is decided alike from both of its ends, so the graph is symmetric.

    Args:
        everyone: M rows, the first at position 0.
        own: positions of the targets.
        tau: threshold; equality does not make an edge.
        chunk: similarities to hold at a time; None = by device.

    Returns:
        source position and target position of the edges into `own`, one self-loop each, (E,) int64, by target, then
        by source; and the degrees of all, (M,) int64.
    """
    total = len(everyone)
    height = max(1, (chunk or default_chunk(everyone.raw.device)) // max(1, total))
    degree = torch.zeros(total, dtype=torch.int64, device=everyone.raw.device)
    sources, targets = [degree[:0]], [degree[:0]]
    for top in range(0, total, height):
        bottom = min(top + height, total)
        edge = above(everyone[top:bottom], everyone, tau)
        edge[:, top:bottom].diagonal().fill_(True)
        torch.sum(edge, 1, out=degree[top:bottom])
        first, end = max(top, own.start), min(bottom, own.stop)
        if first < end:
            target, source = edge[first - top : end - top].nonzero(as_tuple=True)
            sources.append(source)
            targets.append(target + first)
    return torch.cat(sources), torch.cat(targets), degree


def decide_pairs(own: Rows, block: Rows, total: int, tau: float, bits: Tensor, chunk: int | None = None) -> None:
    """Set the bits of the pairs of `own` with `block` that are above `tau` and that `own` decides.

    The M positions stand in a circle: after M - 1 comes 0 again. Position i decides about those up to M / 2 steps
    after it. So every pair is decided once, all ranks do equal work, and half of the similarities are never computed.

    Args:
        own, block: rows with their positions.
        total: M.
        tau: threshold; equality does not make an edge.
        bits: packed (B, ceil(M / 8)) uint8, changed in place.
        chunk: similarities to hold at a time; None = by device.

    Source: GA-Net, arXiv 2408.00290, the undirected graph of cosines above 0.7.
    """
    for rows, columns, decided in decided_tiles(own, block, total, chunk):
        mask = above(rows, columns, tau)
        mask &= decided
        top = rows.start - own.start
        packed.set_bits(bits[top : top + len(rows)], columns.start, mask)


def decided_tiles(
    own: Rows, block: Rows, total: int, chunk: int | None = None
) -> Iterator[tuple[Rows, Rows, Tensor | bool]]:
    """Tiles of `own` x `block` with pairs that `own` decides, as `decide_pairs` says: rows, columns, which pairs."""
    chunk = chunk or default_chunk(own.raw.device)
    # tiles stick out of the half of the matrix by their height
    height = max(1, min(len(own), math.isqrt(chunk // 4), max(64, total // 8)))
    width = max(1, chunk // height)
    for top in range(0, len(own), height):
        rows = own[top : min(top + height, len(own))]
        for left, right in _decided_columns(rows, block, total):
            for at in range(left, right, width):
                columns = block[at - block.start : min(at + width, right) - block.start]
                yield rows, columns, _decides(rows, columns, total)


def _decided_columns(rows: Rows, block: Rows, total: int) -> Iterator[tuple[int, int]]:
    """Stretches of the block's positions in which some of the rows decides."""
    first, end = rows.start + 1, min(rows.start + len(rows) + total // 2, rows.start + 1 + total)
    for turn in (0, total):
        left, right = max(first - turn, block.start), min(end - turn, block.start + len(block))
        if left < right:
            yield left, right


def _decides(rows: Rows, columns: Rows, total: int) -> Tensor | bool:
    """Pairs of a tile that the rows decide, (rows, columns) bool; True where it is all."""
    lowest = columns.start - (rows.start + len(rows) - 1)
    ahead = torch.arange(lowest, columns.start + len(columns) - rows.start)  # on the host, which asks for all of it
    # half way round both would: the earlier one does
    decided = (2 * (ahead % total) < total) & (ahead % total > 0) | (2 * ahead == total)
    return bool(decided.all()) or to_device(decided, rows.raw.device).unfold(0, len(columns), 1).flip(0)


def symmetric_edges(bits: Tensor, rows: slice, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Edges of A or A^T and one self-loop, for some rows of the packed matrix A of all M nodes.

    Args:
        bits: (M, ceil(M / 8)) uint8.
        rows: positions of the targets.
        chunk: entries to unpack at a time.

    Returns:
        source position and target position, (E,) int64 each, by target, then by source.
    """
    total = len(bits)
    height = max(8, (chunk or default_chunk(bits.device)) // max(1, total))
    sources, targets = [], []
    for top in range(rows.start, rows.stop, height):
        bottom = min(top + height, rows.stop)
        edge = packed.unpack(bits[top:bottom])[:, :total]
        first = top // 8
        turned = packed.unpack(bits[:, first : -(-bottom // 8)])[:, top - 8 * first : bottom - 8 * first]
        edge |= turned.T
        own = torch.arange(bottom - top, device=bits.device)
        edge[own, own + top] = True
        target, source = edge.nonzero(as_tuple=True)  # waits: nobody but the features decides how many edges there are
        sources.append(source)
        targets.append(target + top)
    none = torch.zeros(0, dtype=torch.int64, device=bits.device)
    return (torch.cat(sources), torch.cat(targets)) if sources else (none, none)


def symmetric_degrees(bits: Tensor) -> Tensor:
    """Row sums of A or A^T with one self-loop, (M,) int64; no pair may be set both ways in `bits`."""
    return packed.row_counts(bits) + packed.column_counts(bits)[: len(bits)] + 1
