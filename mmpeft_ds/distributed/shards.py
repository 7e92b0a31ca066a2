"""Scores whose columns or summands are spread over ranks, brought to the rank that owns the row.

One convention holds everywhere: the loss of a rank is that of its own rows, and losses are summed (or averaged) over
ranks. The gradient that a rank has for its columns or summands is then its share of a sum over ranks.
"""

# N rows of this rank, M rows of all ranks in rank order, K columns of this rank, C columns of all ranks

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.counters import record
from mmpeft_ds.distributed.gather import _most, _pad, _sum_of_share, gather_rows


def share(total: int, ranks: int, rank: int) -> slice:
    """This rank's part of `total` items, as a slice; lengths differ by at most one, and may be 0."""
    return slice(total * rank // ranks, total * (rank + 1) // ranks)


def sum_to_owner(x: Tensor, counts: list[int], group: Any = None) -> Tensor:
    """Own rows of the sum over ranks: (M, ...) summands of all rows -> (N, ...). Collective, also in backward.

    The gradient of own rows goes, as it is, to every rank's summands of them: the adjoint of `gather_rows`.

    Args:
        counts: N of every rank, in rank order.
    """
    return x if collectives.world_size(group) == 1 else _SumToOwner.apply(x, counts, group)


def columns_to_rows(x: Tensor, rows: list[int], columns: list[int], group: Any = None) -> Tensor:
    """(M, K) own columns of all rows -> (N, C) all columns of own rows. Collective, also in backward.

    Args:
        rows, columns: N and K of every rank, in rank order.
    """
    return x if collectives.world_size(group) == 1 else _ColumnsToRows.apply(x, rows, columns, group)


def sharded_cross_entropy(
    logits: Tensor, labels: Tensor, columns: list[int], counts: list[int], group: Any = None
) -> Tensor:
    """Cross-entropy of own rows where every rank holds some columns of all rows; no rank ever holds all of them.

    Args:
        logits: (M, K), columns of this rank.
        labels: (M,) column of the target, counted over all ranks' columns; in rank order like the rows.
        columns, counts: K and N of every rank.

    Returns:
        (N,) losses.
    """
    return _ShardedCrossEntropy.apply(logits, labels, columns, counts, group)


def all_reduced(x: Tensor, how: Any = dist.ReduceOp.SUM, group: Any = None) -> Tensor:
    """The sum (or another reduction) over ranks, in place of `x`, without gradient. Collective."""
    ranks = collectives.world_size(group)
    if ranks > 1:
        with record("all_reduce", 2 * (ranks - 1) * x.nbytes // ranks, x.device):
            dist.all_reduce(x, op=how, group=group)
    return x


class _SumToOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        most = _most(counts)
        shares = torch.cat([_pad(part, most) for part in x.split(counts)])
        return _sum_of_share(shares, most, group)[: counts[collectives.rank(group)]].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gather_rows(grad, ctx.counts, ctx.group), None, None


class _ColumnsToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], columns: list[int], group: Any) -> Tensor:
        ctx.rows, ctx.columns, ctx.group = rows, columns, group
        mine = rows[collectives.rank(group)]
        return torch.cat(_exchange(x.split(rows), [(mine, k) for k in columns], group), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        mine = ctx.columns[collectives.rank(ctx.group)]
        return torch.cat(_exchange(grad.split(ctx.columns, 1), [(n, mine) for n in ctx.rows], ctx.group)), *[None] * 3


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, columns: list[int], counts: list[int], group: Any) -> Tensor:
        rank = collectives.rank(group)
        local = labels - sum(columns[:rank])
        here = (local >= 0) & (local < columns[rank])
        # One column of -inf more: a rank may hold no column, and targets that other ranks hold need a valid index.
        wide = torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], 1)
        local = local.where(here, wide.shape[1] - 1)
        most = all_reduced(wide.amax(1), dist.ReduceOp.MAX, group)
        parts = torch.stack([(wide - most[:, None]).exp().sum(1), wide.gather(1, local[:, None])[:, 0].where(here, 0)])
        total, target = all_reduced(parts, group=group)
        partition = most + total.log()
        ctx.save_for_backward(logits, partition, local, here)
        ctx.counts, ctx.group = counts, group
        return (partition - target).split(counts)[rank].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, partition, local, here = ctx.saved_tensors
        every = gather_rows(grad, ctx.counts, ctx.group)
        gradient = (logits - partition[:, None]).exp()
        rows = here.nonzero()[:, 0]
        gradient[rows, local[rows]] -= 1
        return gradient * every[:, None], None, None, None, None


def _exchange(blocks: Any, shapes: list[tuple[int, int]], group: Any) -> list[Tensor]:
    """Send block r to rank r; returns the blocks from all ranks, of which that of rank r has shape `shapes[r]`."""
    sent = torch.cat([block.reshape(-1) for block in blocks])
    sizes = [rows * columns for rows, columns in shapes]
    got = sent.new_empty(sum(sizes))
    received = (sum(sizes) - sizes[collectives.rank(group)]) * got.element_size()
    with record("all_to_all", received, got.device):
        dist.all_to_all_single(got, sent, sizes, [block.numel() for block in blocks], group=group)
    return [part.reshape(shape) for part, shape in zip(got.split(sizes), shapes, strict=True)]
