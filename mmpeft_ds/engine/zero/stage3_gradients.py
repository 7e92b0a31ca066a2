"""Adjustment of ZeRO-3 to a few small trained tensors: their gradients are reduced as one tensor."""

# N ranks, S elements of a rank's part

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from mmpeft_ds.distributed.gather import sum_of_share
from mmpeft_ds.engine.zero.gradients import FlatGradients


def reduce_flat(engine: Any) -> bool:
    """Reduce all gradients after the backward pass together; returns whether the configuration allows it.

    DeepSpeed runs a hook for every parameter or leaf in each backward pass, copies each gradient into a bucket and
    from there into this rank's part, and flattens those parts once more before the optimizer: some thirty calls of
    torch a parameter. With a bucket that holds all of them, as the trainer sets it, what is sent is the same: one
    reduce-scatter in each backward pass, of gradients divided by the rank count.
    """
    if not _is_plain(engine):
        return False
    optimizer = engine.optimizer
    for hooks in (optimizer._grad_acc_hooks, optimizer._leaf_module_hooks):
        for hook in hooks:
            hook.remove()
        hooks.clear()
    for bucket in optimizer.ipg_buckets.values():
        bucket.buffer = bucket.buffer.new_empty(0)
    parts = _Parts(optimizer)
    unflatten = optimizer._unflatten_partitioned_parameters

    def write(group: int) -> None:
        if not parts.is_in_place(group):
            unflatten(group)

    optimizer.independent_gradient_partition_epilogue = parts.reduce
    optimizer._prepare_fp32_grad_for_sub_group = parts.prepare
    optimizer._unflatten_partitioned_parameters = write
    return True


def forget_each_step(engine: Any) -> None:
    """Set the gradients that DeepSpeed keeps to zero after every step, where it reduces them itself.

    It writes those of the parameters that a step reads, and adds to what is there from the second micro-batch on, so a
    parameter that nobody reads would move by its gradient of an earlier step
    (`findings/deepspeed_unused_parameter_old_gradient.sh`).
    """
    optimizer = engine.optimizer
    clear = optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        clear(set_to_none)
        optimizer.grad_partitions_flat_buffer.zero_()
        for part in optimizer.fp32_partitioned_groups_flat:
            if part.grad is not None:  # in host memory, where the optimizer is offloaded
                part.grad.zero_()

    optimizer.zero_grad = zero_grad


def _is_plain(engine: Any) -> bool:
    """Whether DeepSpeed itself would reduce all gradients in one call, in float32, and keep them on the device."""
    optimizer = engine.optimizer
    params = [p for group in optimizer.fp16_groups for p in group]
    return (
        engine.zero_optimization_stage() == 3
        and not optimizer.offload_optimizer
        and not optimizer.enable_sanity_checks
        and optimizer.contiguous_gradients
        and optimizer.communication_data_type == optimizer.gradient_accumulation_dtype == torch.float32
        and all(p.dtype == torch.float32 for p in params)
        and sum(p.ds_numel for p in params) <= optimizer.reduce_bucket_size
        and len({id(p.ds_process_group) for p in params}) == 1
    )


class _Parts:
    """This rank's parts of all gradients, one after the other as DeepSpeed keeps them.

    Each parameter is padded to N equal parts.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.groups: list[list[nn.Parameter]] = optimizer.fp16_groups
        self.params = [p for group in self.groups for p in group]
        self.process_group = self.params[0].ds_process_group
        self.ranks = dist.get_world_size(self.process_group)
        self.sizes = [p.partition_numel() for p in self.params]
        self.flat: Tensor = optimizer.grad_partitions_flat_buffer
        self.of_group: list[FlatGradients] = []
        first, sizes = 0, iter(self.sizes)
        for group in self.groups:
            mine = list(itertools.islice(sizes, len(group)))
            self.of_group.append(FlatGradients(self.flat.narrow(0, first, sum(mine)), mine))
            first += sum(mine)

    @torch.no_grad()
    def reduce(self) -> None:
        """After each backward pass, in place of DeepSpeed's `independent_gradient_partition_epilogue`."""
        added = self.optimizer.micro_step_id > 0
        own = self._reduced()
        self.flat.add_(own) if added else self.flat.copy_(own)
        for parameter in self.params:
            parameter.grad = None
        for i, gradients in enumerate(self.of_group):
            self.optimizer.averaged_gradients[i] = gradients
        self.optimizer._epilogue_ran_this_backward = True

    def _reduced(self) -> Tensor:
        """(S,) averages over ranks."""
        # A parameter that this rank's samples did not reach still meets those of the other ranks.
        whole = [self.flat.new_zeros(p.ds_numel) if p.grad is None else p.grad.flatten() for p in self.params]
        if self.ranks == 1:
            return torch.cat(whole)
        sent = torch.cat([self._split(g, n) for g, n in zip(whole, self.sizes, strict=True)], 1).div_(self.ranks)
        own = sent.new_empty(sent.shape[1])
        sum_of_share(own, sent.view(-1), self.process_group)
        return own

    def _split(self, gradient: Tensor, size: int) -> Tensor:
        """(N, size), padded where N does not divide it."""
        short = self.ranks * size - len(gradient)
        return (functional.pad(gradient, (0, short)) if short else gradient).view(self.ranks, size)

    def prepare(self, group: int) -> None:
        """The gradient of the flat master of a parameter group, which is clipped in place."""
        flat = self.of_group[group].flat_partition
        self.optimizer.fp32_partitioned_groups_flat[group].grad = flat.clone()
        self.optimizer.averaged_gradients[group] = None

    def is_in_place(self, group: int) -> bool:
        """Whether the parts of the weights still are views of the flat tensor that the optimizer writes."""
        flat = self.optimizer.fp16_partitioned_groups_flat[group]
        at, width = flat.data_ptr(), flat.element_size()
        for part in self.optimizer.fp16_partitioned_groups[group]:
            if part.data_ptr() != at:
                return False
            at += width * part.numel()
        return True
