"""Parameters that one module holds and many others use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

Tensors = TypeVar("Tensors", bound=Sequence[Tensor])


def whole(tensors: Tensors) -> Tensors:
    """`tensors`, which another module holds, whole also where ZeRO-3 holds them in parts.

    In a forward of its engine DeepSpeed notices that a module reads parameters of another, gathers them, and from then
    on does so before that module runs. Forwards around the engine (generation, evaluation) tell it here.
    """
    away = [p for p in tensors if hasattr(p, "ds_id") and p.numel() != p.ds_numel]
    if away:
        import deepspeed  # only partitioned parameters get here
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        for parameter in away:
            deepspeed.zero.register_external_parameter(FWD_MODULE_STACK[-1], parameter)
            parameter.all_gather()
    return tensors
