"""Exchange of rows round a ring of ranks, so that no rank ever holds the rows of all."""

# B rows of this rank, N ranks

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.counters import record


def ring_blocks(x: Tensor, counts: list[int], group: Any = None) -> Iterator[tuple[int, Tensor]]:
    """The rows of every rank in turn, own ones first: (rank, rows). Collective; must be iterated to its end.

    Where `x` needs gradient, that of each block goes back round the ring and arrives summed at its owner. At most two
    blocks are held at a time.

    Args:
        x: (B, ...); as for `gather_rows`.
        counts: B of every rank.
        group: process group; None = all ranks.
    """
    ranks, mine = collectives.world_size(group), collectives.rank(group)
    most = max(1, max(counts))
    block = x if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    for step in range(ranks):
        owner = (mine - step) % ranks
        yield owner, block[: counts[owner]]
        if step + 1 < ranks:
            block = _Shift.apply(block, 1, group)


class _Shift(torch.autograd.Function):
    """Send the tensor `by` ranks on and receive that of the rank as far back; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: int, group: Any) -> Tensor:
        ctx.by, ctx.group = by, group
        return _shift(x, by, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _shift(grad, -ctx.by, ctx.group), None, None


def _shift(x: Tensor, by: int, group: Any) -> Tensor:
    ranks, mine = collectives.world_size(group), collectives.rank(group)
    x = x.detach().contiguous()
    out = torch.empty_like(x)

    def peer(offset: int) -> int:
        rank = (mine + offset) % ranks
        return rank if group is None else dist.get_global_rank(group, rank)

    with record("shift", x.nbytes, x.device):
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, peer(by), group), dist.P2POp(dist.irecv, out, peer(-by), group)]
        ):
            work.wait()
    return out
