"""Adjustment of ZeRO-1 to a few small trained tensors: their gradients are reduced as one tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class FlatGradients(list[Tensor]):
    """This rank's part of the averaged gradients of a parameter group: views in the order of its parameters, and of
    the padding at the end.

    Attributes:
        flat_partition: all of them as one tensor, which DeepSpeed's optimizer step takes under this name.
    """

    def __init__(self, views: list[Tensor], flat: Tensor):
        super().__init__(views)
        self.flat_partition = flat


def reduce_flat(engine: Any) -> bool:
    """Reduce gradients, and take their norm, a parameter group at a time; returns whether the configuration allows it.

    DeepSpeed runs a hook for every parameter in each backward pass, copies each gradient into a bucket and out of it
    again, and takes the norm of each by itself: some twenty calls of torch a parameter, for adapters of a few hundred
    tensors longer than the arithmetic on them. What reaches the optimizer is the same: gradients divided by the rank
    count and summed in one all-reduce.
    """
    optimizer = engine.optimizer
    if not _is_plain(engine):
        return False
    for hook in optimizer._grad_acc_hooks:  # at stage 1 they only count, and keep a bucket ready
        hook.remove()
    optimizer._grad_acc_hooks.clear()
    norm_of = optimizer.get_grad_norm_direct

    def reduce_gradients(**_: Any) -> None:
        for i in range(len(optimizer.bit16_groups)):
            optimizer.averaged_gradients[i] = _reduced(optimizer, i)
        optimizer._release_ipg_buffers()

    def norm(gradients: FlatGradients, params: list[Any], *args: Any, **kwargs: Any) -> Tensor:
        return norm_of([gradients.flat_partition], params[:1], *args, **kwargs)

    optimizer.reduce_gradients, optimizer.get_grad_norm_direct = reduce_gradients, norm
    return True


def _is_plain(engine: Any) -> bool:
    """Whether it is ZeRO-1 that reduces after the backward pass, in the dtype of the parameters."""
    optimizer = engine.optimizer
    return (
        engine.zero_optimization_stage() == 1
        and not optimizer.overlap_comm
        and not optimizer.cpu_offload
        and not optimizer.use_grad_accum_attribute
        and optimizer.communication_data_type == torch.float32
        and not optimizer.round_robin_gradients
        and not any(any(padding) for padding in optimizer.round_robin_bit16_padding)
    )


def _reduced(optimizer: Any, group: int) -> FlatGradients:
    """Averaged gradients of a group; those of its parameters are released."""
    process_group = optimizer.real_dp_process_group[group]
    ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    size, params = int(optimizer.partition_size[group]), optimizer.bit16_groups[group]
    # A parameter that this rank's samples did not reach still meets those of the other ranks.
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params]
    short = ranks * size - sum(part.numel() for part in parts)
    flat = torch.cat([*parts, parts[0].new_zeros(short)])
    for parameter in params:
        parameter.grad = None
    if ranks > 1:
        dist.all_reduce(flat.div_(ranks), group=process_group)
    flat = flat.narrow(0, rank * size, size)
    lengths = [_own(optimizer, group, rank, p) for p in optimizer.params_in_partition[group]]
    *views, padding = flat.split([*lengths, size - sum(lengths)])
    if padding.numel():
        padding._zero_padding = True
        views.append(padding)
    return FlatGradients(views, flat)


def _own(optimizer: Any, group: int, rank: int, parameter: Any) -> int:
    """Elements of a parameter that lie in this rank's partition."""
    number = optimizer.get_param_id(parameter)
    start = int(optimizer.grad_start_offset[group][rank][number])
    behind = int(optimizer.partition_size[group] - optimizer.grad_partition_insertion_offset[group][rank][number])
    return min(parameter.numel() - start, behind)
