"""Optimisers that a recipe can name: their construction, parameter groups and state.

All are torch's; DeepSpeed steps them on the parts of parameters that a rank holds under ZeRO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.recipe import Recipe
from mmpeft_ds.recipe.options import OptimOptions

# Names of the state tensors that have the shape of the parameter. Adam has a counter of steps besides, SGD none.
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}
TITLES = {"adamw": "AdamW", "adam": "Adam with L2", "sgd": "SGD with momentum"}


def make(groups: list[dict[str, Any]], options: OptimOptions) -> torch.optim.Optimizer:
    """The optimiser of `options` over parameter groups, each with its own `weight_decay`."""
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.name]
    return cls(groups, lr=options.lr, betas=tuple(options.betas), eps=options.eps)


def parameter_groups(
    trainables: dict[str, nn.Parameter], recipe: Recipe, decays: Callable[[str], bool] | None = None
) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms) do not, except those whose name `decays` accepts, and names that contain
    one of `optim.no_decay` never do."""
    decay = recipe.optim.weight_decay
    if not decay:  # one group: half the collectives of ZeRO's per-group reductions
        return [{"params": list(trainables.values()), "weight_decay": 0.0}]

    def exempt(name: str, parameter: nn.Parameter) -> bool:
        vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
        return (vector and not (decays and decays(name))) or any(f in name for f in recipe.optim.no_decay)

    plain = [p for n, p in trainables.items() if exempt(n, p)]
    decayed = [p for n, p in trainables.items() if not exempt(n, p)]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def name_of(optimizer: Any) -> str:
    """Name of `optimizer` in recipes.

    Raises:
        TypeError: for one that no recipe can name.
    """
    for cls, name in ((torch.optim.AdamW, "adamw"), (torch.optim.Adam, "adam"), (torch.optim.SGD, "sgd")):
        if isinstance(optimizer, cls):  # AdamW is an Adam, so it comes first
            return name
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return "adamw" if optimizer.adam_w_mode else "adam"
    raise TypeError(f"checkpoints hold the state of {', '.join(MOMENTS)}, not of {type(optimizer).__name__}")


def new_state(optimizer: Any, flat: Tensor) -> dict[str, Any]:
    """State of `flat` before the first step: as Adam's first step creates it, and for SGD a buffer of zeros.

    torch's SGD has no buffer before its first step, which makes the gradient the buffer. With a buffer of zeros it
    computes momentum * 0 + gradient, which are the same numbers (a gradient of -0 becomes 0).
    """
    name = name_of(optimizer)
    state: dict[str, Any] = {key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in MOMENTS[name]}
    if name == "sgd":
        return state
    if isinstance(optimizer, torch.optim.Adam):
        group = optimizer.param_groups[0]
        on_device = group.get("capturable") or group.get("fused")
        step: Any = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
    else:
        step = 0
    return {"step": step, **state}
