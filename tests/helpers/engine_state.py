"""Whole masters and moments by DeepSpeed's own calls, one collective a tensor: the reference for ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.engine.zero import state as zero_state


def read_weight(parameter: nn.Parameter) -> Tensor:
    """The float32 master of one parameter of a DeepSpeed engine, whole, on the CPU. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter) if _is_partitioned(parameter) else parameter
    return full.detach().to("cpu", torch.float32, copy=True).reshape(zero_state.full_shape(parameter))


def read_full(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """`weight` and the optimizer's `moments` of one parameter, whole and float32, on the CPU. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    keys = zero_state.moments(engine, parameter)
    if _is_partitioned(parameter):
        held = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
    else:
        held = {key: engine.optimizer.state[parameter][key] for key in keys}
    shape = zero_state.full_shape(parameter)
    whole = {key: value.detach().to("cpu", torch.float32, copy=True).reshape(shape) for key, value in held.items()}
    return {"weight": read_weight(parameter)} | whole


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
