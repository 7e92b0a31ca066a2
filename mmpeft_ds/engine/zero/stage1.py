"""Adjustment of ZeRO-1 to a few small trained tensors: their gradients are one tensor, which autograd writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmpeft_ds.engine.zero.gradients import FlatGradients


def reduce_flat(engine: Any) -> bool:
    """Reduce gradients, and take their norm, a parameter group at a time; returns whether the configuration allows it.

    DeepSpeed runs a hook for every parameter in each backward pass, copies each gradient into a bucket and out of it
    again, and takes the norm of each by itself: some twenty calls of torch a parameter, for adapters of a few hundred
    tensors longer than the arithmetic on them. Here the gradient of a parameter is a part of one tensor from the start
    to the end of a run, so that nothing is copied. What reaches the optimizer is the same: gradients divided by the
    rank count and summed in one all-reduce.
    """
    optimizer = engine.optimizer
    if not _is_plain(engine):
        return False
    for hook in optimizer._grad_acc_hooks:  # at stage 1 they only count, and keep a bucket ready
        hook.remove()
    optimizer._grad_acc_hooks.clear()
    norm_of, write = optimizer.get_grad_norm_direct, optimizer._update_model_bit16_weights
    parts = [_Part(optimizer, i) for i in range(len(optimizer.bit16_groups))]

    def reduce_gradients(**_: Any) -> None:
        for i, part in enumerate(parts):
            optimizer.averaged_gradients[i] = part.reduced()

    def zero_grad(set_to_none: bool = True) -> None:
        for part in parts:
            part.clear()

    def norm(gradients: FlatGradients, params: list[Any], *args: Any, **kwargs: Any) -> Tensor:
        return norm_of([gradients.flat_partition], params[:1], *args, **kwargs)

    def update(group: int) -> None:
        if not parts[group].is_in_place():
            write(group)

    optimizer.reduce_gradients, optimizer.get_grad_norm_direct = reduce_gradients, norm
    optimizer._update_model_bit16_weights = update
    optimizer.zero_grad, optimizer.free_grad_in_param_list = zero_grad, lambda params: None
    zero_grad()
    _run_directly(engine, reduce_gradients)
    return True


def _run_directly(engine: Any, reduce_gradients: Callable[[], None]) -> None:
    """Let the passes of the engine be those of its module, without what DeepSpeed does for hooks of parameters, of
    which there are none, for scaled losses, and for backward passes that are begun without the engine."""

    def backward(loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        loss = loss / engine.gradient_accumulation_steps() if scale_wrt_gas else loss
        loss.backward(retain_graph=retain_graph)
        if engine.is_gradient_accumulation_boundary():
            reduce_gradients()
        return loss

    engine.forward, engine.backward = lambda *args, **kwargs: engine.module(*args, **kwargs), backward


def _is_plain(engine: Any) -> bool:
    """Whether it is ZeRO-1 that reduces after the backward pass, in the dtype of the parameters."""
    optimizer = engine.optimizer
    return (
        engine.zero_optimization_stage() == 1
        and not optimizer.overlap_comm
        and not optimizer.cpu_offload
        and not optimizer.use_grad_accum_attribute
        and optimizer.loss_scale == 1
        and not optimizer.dynamic_loss_scale
        and not engine.torch_autocast_enabled()
        and not engine.is_deepcompile_enabled()
        and optimizer.communication_data_type == torch.float32
        and not optimizer.round_robin_gradients
        and not any(any(padding) for padding in optimizer.round_robin_bit16_padding)
    )


class _Part:
    """This rank's part of a parameter group."""

    def __init__(self, optimizer: Any, group: int):
        self.group, self.params = optimizer.real_dp_process_group[group], optimizer.bit16_groups[group]
        self.ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.size = int(optimizer.partition_size[group])
        self.weights, self.starts = optimizer.bit16_groups_flat[group], optimizer.round_robin_bit16_offsets[group]
        self.lengths = [_own(optimizer, group, self.rank, p) for p in optimizer.params_in_partition[group]]
        self.places: tuple[int, list[int]] = 0, []  # address of the flat tensor, and of each parameter within it
        self.gradients = torch.zeros_like(self.weights)  # of all parameters, and padding
        at = zip(self.params, self.starts, strict=True)
        self.views = [self.gradients.narrow(0, start, p.numel()).view_as(p) for p, start in at]

    def reduced(self) -> FlatGradients:
        """Averaged gradients. A parameter that this rank's samples did not reach has zeros, which still meet those of
        the other ranks."""
        for parameter, view in zip(self.params, self.views, strict=True):
            if (gradient := parameter.grad) is not view:  # someone has released it
                view.zero_() if gradient is None else view.copy_(gradient)
                parameter.grad = view
        if self.ranks > 1:
            dist.all_reduce(self.gradients.div_(self.ranks), group=self.group)
        return FlatGradients(self.gradients.narrow(0, self.rank * self.size, self.size), self.lengths)

    def clear(self) -> None:
        """Zeros, to which autograd adds the gradients of the next step."""
        self.gradients.zero_()
        for parameter, view in zip(self.params, self.views, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    def is_in_place(self) -> bool:
        """Whether the parameters still are views of the flat tensor that the optimizer writes: DeepSpeed makes them
        such again after every step, four calls of torch each."""
        first, width = self.weights.data_ptr(), self.weights.element_size()
        if first != self.places[0]:
            self.places = first, [first + width * at for at in self.starts]
        return list(map(Tensor.data_ptr, self.params)) == self.places[1]


def _own(optimizer: Any, group: int, rank: int, parameter: Any) -> int:
    """Elements of a parameter that lie in this rank's partition."""
    number = optimizer.get_param_id(parameter)
    start = int(optimizer.grad_start_offset[group][rank][number])
    behind = int(optimizer.partition_size[group] - optimizer.grad_partition_insertion_offset[group][rank][number])
    return min(parameter.numel() - start, behind)
