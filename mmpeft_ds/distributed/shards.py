"""Scores whose columns or whose summands are spread over ranks, back to the rank that owns the row.

Everything here keeps one convention: the loss of a rank is that of its own rows, and losses are summed (or averaged)
over ranks. The gradient that a rank finds for what it holds is then its share of a sum over ranks, whatever it holds.
"""

# N rows of this rank, M rows of all ranks in rank order, K columns of this rank, C columns of all ranks

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmpeft_ds.distributed.gather import gather_rows


def ranks_of(group: Any = None) -> int:
    """Ranks of a group; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank_in(group: Any = None) -> int:
    """This rank in a group; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def share(total: int, ranks: int, rank: int) -> slice:
    """This rank's stretch of `total` things; lengths differ by at most one, and may be 0."""
    return slice(total * rank // ranks, total * (rank + 1) // ranks)


def sum_to_owner(x: Tensor, counts: list[int], group: Any = None) -> Tensor:
    """Own rows of the sum over ranks: (M, ...) summands of all rows -> (N, ...). Collective, also in backward.

    The gradient of own rows goes to every rank's summands of them: it is the adjoint of `gather_rows`.

    Args:
        counts: N of every rank, in rank order.
    """
    return x if ranks_of(group) == 1 else _SumToOwner.apply(x, counts, group)


def columns_to_rows(x: Tensor, rows: list[int], columns: list[int], group: Any = None) -> Tensor:
    """(M, K) own columns of all rows -> (N, C) all columns of own rows. Collective, also in backward.

    Args:
        rows, columns: N and K of every rank, in rank order.
    """
    return x if ranks_of(group) == 1 else _ColumnsToRows.apply(x, rows, columns, group)


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


class _SumToOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _reduce_rows(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gather_rows(grad, ctx.counts, ctx.group), None, None


class _ColumnsToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], columns: list[int], group: Any) -> Tensor:
        ctx.rows, ctx.columns, ctx.group = rows, columns, group
        mine = rows[rank_in(group)]
        blocks = _exchange(list(x.split(rows)), [(mine, k) for k in columns], group)
        return torch.cat(blocks, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        mine = ctx.columns[rank_in(ctx.group)]
        blocks = _exchange(list(grad.split(ctx.columns, 1)), [(n, mine) for n in ctx.rows], ctx.group)
        return torch.cat(blocks), None, None, None


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, columns: list[int], counts: list[int], group: Any) -> Tensor:
        rank = rank_in(group)
        local = labels - sum(columns[:rank])
        here = (local >= 0) & (local < columns[rank])
        # a rank may hold no column at all
        wide = torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], 1)
        most = _all_reduced(wide.amax(1), dist.ReduceOp.MAX, group)
        total = _all_reduced((wide - most[:, None]).exp().sum(1), dist.ReduceOp.SUM, group)
        local = local.where(here, torch.full_like(local, wide.shape[1] - 1))
        target = wide.gather(1, local[:, None])[:, 0].where(here, most.new_zeros(()))
        target = _all_reduced(target, dist.ReduceOp.SUM, group)
        losses = total.log() + most - target
        ctx.save_for_backward(logits, most + total.log(), local, here)
        ctx.counts, ctx.group = counts, group
        first = sum(counts[:rank])
        return losses[first : first + counts[rank]].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, partition, local, here = ctx.saved_tensors
        every = gather_rows(grad, ctx.counts, ctx.group)
        found = (logits - partition[:, None]).exp()
        rows = here.nonzero()[:, 0]
        found[rows, local[rows]] -= 1
        return found * every[:, None], None, None, None, None


def _all_reduced(x: Tensor, how: Any, group: Any) -> Tensor:
    if ranks_of(group) > 1:
        dist.all_reduce(x, op=how, group=group)
    return x


def _reduce_rows(x: Tensor, counts: list[int], group: Any) -> Tensor:
    """Own rows of the sum over ranks, without gradient."""
    rank = rank_in(group)
    if dist.get_backend(group) == "nccl":
        most = max(counts)
        padded = x.new_zeros(len(counts), most, *x.shape[1:])
        for block, rows in zip(padded, x.split(counts), strict=True):
            block[: len(rows)] = rows
        own = x.new_empty(most, *x.shape[1:])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=group)
        return own[: counts[rank]]
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    first = sum(counts[:rank])
    return total[first : first + counts[rank]].clone()


def _exchange(blocks: list[Tensor], shapes: list[tuple[int, int]], group: Any) -> list[Tensor]:
    """Block r goes to rank r; what comes back from rank r has shape `shapes[r]`."""
    sent = torch.cat([block.reshape(-1) for block in blocks])
    sizes = [a * b for a, b in shapes]
    got = sent.new_empty(sum(sizes))
    dist.all_to_all_single(got, sent, sizes, [block.numel() for block in blocks], group=group)
    return [part.reshape(shape) for part, shape in zip(got.split(sizes), shapes, strict=True)]
