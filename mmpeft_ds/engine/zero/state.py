"""Reading and writing of trained parameters, their float32 masters and optimiser state under any ZeRO stage.

DeepSpeed 0.19.8 does not do the following by itself (each was measured), so it is done here:

* The optimiser's state does not exist before the first step; it is created, as torch's optimiser would.
* Under ZeRO-3 the `safe_set_full_*` calls raise for sizes that the rank count does not divide; the own slice is set.
* Setting a master does not set the parameter that the next forward uses; it is written as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmpeft_ds.distributed import collectives
from mmpeft_ds.engine.optim import optimizers


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def optimizer_name(engine: Any) -> str:
    """Name in recipes of the optimizer that DeepSpeed steps, such as `adamw`."""
    return optimizers.name_of(inner(engine))


def moments(engine: Any, parameter: nn.Parameter | None = None) -> tuple[str, ...]:
    """Names of the optimizer's state tensors that have the shape of the parameter; without one, those of any."""
    return optimizers.moments(inner(engine), parameter)


def ensure_optimizer_state(engine: Any) -> None:
    """Create the state that the optimizer's first step would create, where it does not exist yet.

    Raises:
        TypeError: for an optimizer that no recipe can name.
    """
    zero = engine.optimizer
    create_missing_state(engine)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        # Stages 1 and 2: link each parameter's views into the flat state. DeepSpeed does so once, after the step of
        # the first parameter group, when the other groups have no state yet.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def create_missing_state(engine: Any) -> None:
    """Create the optimizer's state as `ensure_optimizer_state` does, which DeepSpeed then does not know of."""
    stepping = inner(engine)
    for flat in _flat_masters(engine):
        if not stepping.state[flat]:
            stepping.state[flat].update(optimizers.new_state(stepping, flat))


def flat_tensors(engine: Any, keys: Iterable[str]) -> dict[tuple[str, int], Tensor]:
    """The tensors that the optimizer steps on, and its moments of them, on this rank.

    Args:
        keys: `weight`, and names of moments.

    Returns:
        (key, number of the tensor) -> tensor; not those that have no such moment, as Muon's and AdamW's differ.
    """
    stepping, masters = inner(engine), _flat_masters(engine)
    every = (
        (key, i, master if key == "weight" else stepping.state[master].get(key))
        for key in keys
        for i, master in enumerate(masters)
    )
    return {(key, i): tensor for key, i, tensor in every if tensor is not None}


def state_sums(engine: Any, held: dict[tuple[str, int], Tensor] | None = None, group: Any = None) -> dict[str, int]:
    """Per moment of the optimizer, the sum of the raw bits of all its numbers over all ranks, mod 2^32. Collective.

    Read from the tensors that the optimizer steps on, not through DeepSpeed's map from parameters to them.

    Args:
        held: copies of `flat_tensors`, on the CPU, to read in their place.
        group: of all ranks, on CPUs, for the sums; None: that of the run.
    """
    keys, own, numbers = moments(engine), [], range(len(_flat_masters(engine)))
    held = flat_tensors(engine, keys) if held is None else held
    for key in keys:
        flats = (held.get((key, i)) for i in numbers)
        own.append(sum(bits_sum(part) for flat in _without_padding(engine, flats) for part in flat) % 2**32)
    if keys and engine.zero_optimization_stage() > 0:
        own = collectives.sum_scalars(own, engine.device if group is None else "cpu", group)  # exact in float64
    return {key: int(total) % 2**32 for key, total in zip(keys, own, strict=True)}


def bits_sum(tensor: Tensor) -> int:
    """Sum of the raw bits of a float32 tensor mod 2^32, as a signed integer.

    In 32 bits, which wrap around: torch takes forty times as long to add the same numbers up in 64.
    """
    return int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int32))


def optimizer_step(engine: Any) -> int:
    """Steps that Adam has counted, for its bias correction; 0 for SGD, which counts none."""
    return max(map(int, step_counters(engine)), default=0)


def step_counters(engine: Any) -> list[Any]:
    """Adam's counters of steps, numbers or tensors; 0 for what has none."""
    stepping = inner(engine)
    return [stepping.state[flat].get("step", 0) for flat in _flat_masters(engine)]


def set_optimizer_step(engine: Any, step: int) -> None:
    """Set Adam's counter of every parameter; SGD has none."""
    stepping = inner(engine)
    for flat in _flat_masters(engine):
        state = stepping.state[flat]
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step


def write_full(engine: Any, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
    """Set master and moments of one parameter from whole tensors that every rank has, but not the parameter itself."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_tensor"):
        for key, value in values.items():
            part = _own_part(parameter, value)
            if key == "weight":
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
    elif _is_partitioned(parameter):
        for key, value in values.items():
            if key == "weight":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
    else:  # without ZeRO the parameter is the master
        for key in values.keys() - {"weight"}:
            engine.optimizer.state[parameter][key].copy_(values[key])


def write_weight(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Set master and parameter from a whole tensor that every rank has. Collective."""
    if engine.zero_optimization_stage() > 0:  # without ZeRO the parameter is the master
        write_full(engine, parameter, {"weight": value})
    write_parameter(parameter, value)


def write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the parameter that the forward uses from a whole tensor that every rank has."""
    if hasattr(parameter, "ds_tensor"):
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameter.ds_tensor.data.copy_(_own_part(parameter, value))
        parameter.ds_secondary_tensor = None  # the copy of hpZ, which is made again from the part
        if parameter.ds_status != ZeroParamStatus.AVAILABLE:
            return
    parameter.data.copy_(value)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def inner(engine: Any) -> Any:
    """torch's optimizer, which DeepSpeed steps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)  # stage 0 has no wrapper


def _flat_masters(engine: Any) -> list[Tensor]:
    """Tensors that are the keys of the inner optimizer's state on this rank."""
    zero = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # stage 3; stages 1 and 2
        if hasattr(zero, attribute):
            return list(getattr(zero, attribute))
    return [p for group in zero.param_groups for p in group["params"]]


def _without_padding(engine: Any, flats: Iterable[Tensor | None]) -> Iterator[Iterator[Tensor]]:
    """The parts of flat tensors that belong to parameters. Only stage 3 pads between them, with undefined values; what
    stages 1 and 2 add at the end is 0."""
    groups = getattr(engine.optimizer, "fp16_groups", None)
    if groups is None:
        yield from (iter([flat]) for flat in flats if flat is not None)
        return
    for group, flat in zip(groups, flats, strict=True):
        if flat is None:
            continue
        parts = flat.split(
            [p.ds_tensor.ds_numel for p in group] + [flat.numel() - sum(p.ds_tensor.ds_numel for p in group)]
        )
        yield (part[: own_elements(p)] for p, part in zip(group, parts, strict=False))


def own_elements(parameter: nn.Parameter) -> int:
    """Number of elements of a parameter partitioned by ZeRO-3 that belong to this rank; its partition may be
    longer."""
    size = parameter.ds_tensor.ds_numel
    start = dist.get_rank(group=parameter.ds_process_group) * size
    return max(0, min(size, parameter.ds_numel - start))


def _own_part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's slice of a whole tensor, padded with zeros to the size of a partition."""
    size = parameter.ds_tensor.ds_numel
    start = dist.get_rank(group=parameter.ds_process_group) * size
    own = value.reshape(-1)[start : start + size]
    return own if own.numel() == size else nn.functional.pad(own, (0, size - own.numel()))
