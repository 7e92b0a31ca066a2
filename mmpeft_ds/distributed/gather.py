"""All ranks' rows of a tensor, with the gradient of what every rank does with them."""

# N rows of this rank, M rows of all ranks in rank order

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_sizes(sizes: list[int], device: torch.device | str, group: Any = None) -> list[list[int]]:
    """The numbers of every rank, in rank order; all ranks give as many. Collective."""
    if _size(group) == 1:
        return [list(sizes)]
    mine = torch.tensor(sizes, dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).tolist()


def gather_rows(x: Tensor, counts: list[int] | None = None, group: Any = None) -> Tensor:
    """Rows of all ranks, the same on every rank. Collective, forward and (where `x` needs gradient) backward.

    The gradient of a rank's rows is the SUM over ranks of what each found for them, undivided: with losses that are
    this rank's share of one sum, averaged or summed over ranks afterwards, it is that of a single rank with all rows.
    All ranks must take part in the backward, also one whose loss does not depend on the rows (times 0).

    Args:
        x: (N, ...); ranks may have different N, also 0, but equal other sizes.
        counts: N of every rank, where it is known already.
        group: process group; None = all ranks. Without a process group, or alone in it, `x` itself is returned.

    Returns:
        (M, ...).
    """
    if _size(group) == 1:
        return x
    counts = [n for (n,) in gather_sizes([len(x)], x.device, group)] if counts is None else counts
    return _Gather.apply(x, counts, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        most = max(counts)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded, group=group)
        return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        start = sum(ctx.counts[:rank])
        return total[start : start + ctx.counts[rank]], None, None


def _size(group: Any) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1
