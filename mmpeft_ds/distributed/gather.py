"""Gather of all ranks' rows of a tensor, with the gradient of what every rank does with them."""

# B rows of this rank, M rows of all ranks in rank order, N ranks

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.counters import record
from mmpeft_ds.ops.precision import at_least_float32

# torch before 2.13 has other names for these two.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
# Other backends have no reduce-scatter: they sum everything and keep a part.
_SCATTERS = {"nccl", "gloo", "xccl", "hccl"}


def gather_sizes(sizes: list[int], device: torch.device | str, group: Any = None) -> list[list[int]]:
    """The numbers of every rank, in rank order; all ranks give as many. Collective."""
    if collectives.world_size(group) == 1:
        return [list(sizes)]
    mine = torch.tensor(sizes, dtype=torch.int64).to(device)
    return all_gather(mine, group).tolist()


def gather_rows(x: Tensor, counts: list[int] | None = None, group: Any = None) -> Tensor:
    """Rows of all ranks, the same on every rank. Collective, forward and (where `x` needs gradient) backward.

    The gradient of a rank's rows is the SUM of the gradients that all ranks have for them, not divided. Where each
    rank's loss is its share of one sum, this is the gradient that a single rank with all rows would have.
    All ranks must take part in the backward, also one whose loss does not depend on the rows (times 0), and `x` must
    need gradient on all ranks or on none. The backward is a reduce-scatter; half precision is summed in float32.

    Args:
        x: (B, ...); ranks may have different B, also 0, but equal other sizes.
        counts: B of every rank, where it is known already; else one more small collective finds it.
        group: process group; None = all ranks. Without a process group, or alone in it, `x` itself is returned.

    Returns:
        (M, ...).

    Source: GA-Net across ranks, scheme S; arXiv 2408.00290 has one device only.
    """
    if collectives.world_size(group) == 1:
        return x
    counts = [n for (n,) in gather_sizes([len(x)], x.device, group)] if counts is None else counts
    return _Gather.apply(x, counts, group)


def all_gather(x: Tensor, group: Any = None) -> Tensor:
    """Equal tensors of N ranks stacked: (N, *x.shape). Collective, without gradient."""
    ranks = collectives.world_size(group)
    x = x.detach().contiguous()
    # Not every backend sends booleans; as bytes they have the same bits.
    as_bytes = x.view(torch.uint8) if x.dtype == torch.bool else x
    everyone = as_bytes.new_empty(ranks * as_bytes.numel())
    with record("all_gather", (ranks - 1) * as_bytes.nbytes, x.device):
        getattr(dist, _ALL_GATHER)(everyone, as_bytes.reshape(-1), group=group)
    return everyone.view(x.dtype).view(ranks, *x.shape)


def gather_on_rank0(x: Tensor, out: Tensor | None = None, group: Any = None) -> Tensor | None:
    """Equal tensors of N ranks stacked: (N, *x.shape) on rank 0, None on the others. Collective, without gradient.

    Args:
        out: contiguous, of that shape and the dtype of `x`, which rank 0 fills and returns; None: a new one.
        group: of all ranks, by default that of the run.
    """
    x, ranks, first = x.detach().contiguous(), collectives.world_size(), collectives.rank() == 0
    if ranks == 1:
        return x[None] if out is None else out.copy_(x[None])
    everyone = out if out is not None or not first else x.new_empty(ranks, *x.shape)
    with record("gather", (ranks - 1) * x.nbytes if first else 0, x.device):
        dist.gather(x, list(everyone) if first else None, dst=0, group=group)
    return everyone


def exchange_rows(x: Tensor, counts: list[int], group: Any = None) -> Tensor:
    """The parts of all ranks for this rank's rows: (N, B, ...) from (M, ...) on each. Collective, without gradient.

    Args:
        x: (M, ...), a part for each rank in rank order.
        counts: B of every rank.
        group: process group; None = all ranks.
    """
    ranks, mine = collectives.world_size(group), counts[collectives.rank(group)]
    if ranks == 1:
        return x[None]
    out = x.new_empty(ranks * mine, *x.shape[1:])
    with record("all_to_all", (ranks - 1) * out.nbytes // ranks, x.device):
        dist.all_to_all_single(out, x.contiguous(), [mine] * ranks, counts, group=group)
    return out.view(ranks, mine, *x.shape[1:])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        everyone = all_gather(_pad(x, _most(counts)), group)
        if len(set(counts)) == 1:
            return everyone[:, : counts[0]].flatten(0, 1)
        return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        most, mine = _most(ctx.counts), ctx.counts[collectives.rank(ctx.group)]
        shares = torch.cat([_pad(part, most) for part in at_least_float32(grad).split(ctx.counts)])
        return _sum_of_share(shares, most, ctx.group)[:mine].to(grad.dtype), None, None


def sum_of_share(out: Tensor, shares: Tensor, group: Any = None) -> None:
    """Sum over ranks of this rank's share of (N, ...), into `out`. Collective; `counters` do not see it."""
    getattr(dist, _REDUCE_SCATTER)(out, shares, op=dist.ReduceOp.SUM, group=group)


def _sum_of_share(shares: Tensor, size: int, group: Any) -> Tensor:
    """Sum over ranks of this rank's `size` rows of (N size, ...)."""
    ranks, shares = collectives.world_size(group), shares.contiguous()
    if dist.get_backend(group) in _SCATTERS:
        out = shares.new_empty(size, *shares.shape[1:])
        with record("reduce_scatter", (ranks - 1) * out.nbytes, shares.device):
            sum_of_share(out, shares, group)
        return out
    with record("all_reduce", 2 * (ranks - 1) * shares.nbytes // ranks, shares.device):
        dist.all_reduce(shares, group=group)
    return shares.narrow(0, collectives.rank(group) * size, size)


def _most(counts: list[int]) -> int:
    """Number of rows that every rank sends: at least one, since some backends refuse empty tensors."""
    return max(1, max(counts))


def _pad(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x
    padded = x.new_zeros(rows, *x.shape[1:])
    padded[: len(x)] = x
    return padded
