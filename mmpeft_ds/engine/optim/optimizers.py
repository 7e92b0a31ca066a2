"""Optimisers that a recipe can name: their construction, parameter groups and state.

All are torch's, Muon in a form that works on parts; DeepSpeed steps them on what a rank holds under ZeRO.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.engine.optim.muon import MOMENTUM, Muon
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe import Recipe, where
from mmpeft_ds.recipe.options import GroupOptions, OptimOptions

# Names of the state tensors that have the shape of the parameter: of Muon those of matrices, whose others are AdamW's.
# Adam has a counter of steps besides, SGD and Muon none.
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "muon": (MOMENTUM,),
}
EMBEDDING_LR = 1e-6  # of LoRA's factors of embeddings under LoRA+, as in peft
TITLES = {"adamw": "AdamW", "adam": "Adam with L2", "sgd": "SGD with momentum", "muon": "Muon"}


def make(groups: list[dict[str, Any]], options: OptimOptions) -> torch.optim.Optimizer:
    """The optimiser of `options` over parameter groups of `parameter_groups`."""
    if options.name == "muon":
        muon = options.muon
        given = {name: getattr(muon, name) for name in ("momentum", "nesterov", "ns_steps", "adjust_lr_fn")}
        return Muon(groups, lr=options.lr, betas=tuple(options.betas), eps=options.eps, **given)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.name]
    return cls(groups, lr=options.lr, betas=tuple(options.betas), eps=options.eps)


def parameter_groups(
    trainables: dict[str, nn.Parameter],
    recipe: Recipe,
    decays: Callable[[str], bool] | None = None,
    is_map: Callable[[str], bool] | None = None,
) -> list[dict[str, Any]]:
    """Parameters that share learning rate and decay, each group with `weight_decay`, and `lr_share`, the multiple of
    `optim.lr` that it learns with; for Muon with `muon`, whether it steps them and not AdamW.

    Matrices decay; vectors (biases, norms) do not, except those whose name `decays` accepts, and names that contain
    one of `optim.no_decay` never do, unless `optim.groups` says otherwise.

    Args:
        is_map: whether the matrix of a name maps hidden vectors, so that Muon steps it (`SiteMethod.is_map`).

    Raises:
        BadInput: a pattern of `optim.groups` fits no name that an earlier one has not taken, or gives Muon no
            matrix; `optim.lora_plus`, and there is no LoRA; Muon, and there is no matrix for it.
    """
    optim = recipe.optim
    taken = dict.fromkeys(optim.groups, 0)
    for_muon = {pattern for pattern, own in optim.groups.items() if own.optimizer == "muon"}
    members: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in trainables.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        pattern = next((p for p in optim.groups if fnmatchcase(name, p)), None)
        if pattern is not None:
            taken[pattern] += 1
        own = optim.groups[pattern] if pattern is not None else GroupOptions()
        muon = len(shape) == 2 and _by_muon(own, optim, is_map is None or is_map(name))
        if muon:
            for_muon.discard(pattern)
        vector = len(shape) < 2
        exempt = (vector and not (decays and decays(name))) or any(f in name for f in optim.no_decay)
        decay = own.weight_decay if own.weight_decay is not None else 0.0 if exempt else optim.weight_decay
        lr = own.lr if own.lr is not None else _lora_plus(name, vector, optim, muon)
        # One group where nothing differs: half the collectives of ZeRO's per-group reductions.
        members.setdefault((muon, lr / optim.lr if optim.lr else 1.0, decay), []).append(parameter)
    _refuse_idle([p for p, count in taken.items() if not count], trainables, recipe)
    _refuse_without_matrix(recipe, trainables, for_muon, any(muon for muon, *_ in members))
    ordered = sorted(members.items(), key=lambda item: item[0][2] == 0)
    return [
        {
            "params": params,
            "weight_decay": decay,
            "lr_share": share,
            **({"muon": muon} if optim.name == "muon" else {}),
        }
        for (muon, share, decay), params in ordered
    ]


def moments(optimizer: Any, parameter: Tensor | None = None) -> tuple[str, ...]:
    """Names of the state tensors that have the shape of a parameter, or a flat tensor of parameters; without one,
    those that any has."""
    if not isinstance(optimizer, Muon):
        return MOMENTS[name_of(optimizer)]
    if parameter is not None:
        return MOMENTS["muon" if optimizer.orthogonalises(parameter) else "adamw"]
    return MOMENTS["adamw"] + MOMENTS["muon"]


def mean_moments(groups: list[dict[str, Any]], name: str) -> float:
    """State tensors for each trained element, on average; `groups` of `parameter_groups` with whole parameters."""
    sizes = [(sum(p.numel() for p in group["params"]), group.get("muon", False)) for group in groups]
    total = sum(size for size, _ in sizes)
    if name != "muon" or not total:
        return len(MOMENTS[name])
    return math.fsum(size * len(MOMENTS["muon" if muon else "adamw"]) for size, muon in sizes) / total


def _refuse_idle(patterns: list[str], trainables: dict[str, nn.Parameter], recipe: Recipe) -> None:
    """Raise BadInput for the first of the patterns, all of which fit nothing."""
    for pattern in patterns:
        like = difflib.get_close_matches(pattern, trainables, n=1, cutoff=0.0)
        raise BadInput(
            f"{where(recipe, 'optim.groups')}: {pattern!r} fits no trained parameter, or only such as an earlier "
            f"pattern has taken. They are named like {', '.join(like or list(trainables)[:1])}."
        )


def _refuse_without_matrix(
    recipe: Recipe, trainables: dict[str, nn.Parameter], for_muon: set[str], muon_steps: bool
) -> None:
    """Raise BadInput where an option is for matrices of a kind that does not train.

    Args:
        for_muon: patterns of `optim.groups` that name Muon and fit no matrix.
        muon_steps: whether Muon has any matrix to step.
    """
    optim = recipe.optim
    if for_muon:
        raise BadInput(
            f"{where(recipe, 'optim.groups')}: {min(for_muon)!r} gives muon no matrix. Leave out its optimizer, or "
            "use a pattern that fits matrices."
        )
    if optim.lora_plus and not any(".lora_B." in name for name in trainables):
        raise BadInput(
            f"{where(recipe, 'optim.lora_plus')}: is for LoRA, and nothing named lora_B trains. Leave it out."
        )
    if optim.name == "muon" and trainables and not muon_steps:
        raise BadInput(
            f"{where(recipe, 'optim.name')}: muon steps matrices that map hidden vectors, and none trains. Use adamw, "
            "or name other matrices in optim.groups with optimizer: muon."
        )


def _by_muon(own: GroupOptions, optim: OptimOptions, is_map: bool) -> bool:
    """Whether Muon steps a matrix, and not AdamW."""
    if own.optimizer is not None:
        return own.optimizer == "muon"
    return optim.name == "muon" and is_map


def _lora_plus(name: str, vector: bool, optim: OptimOptions, muon: bool) -> float:
    """Peak learning rate of a parameter, with the multiples of `peft.optimizers.create_loraplus_optimizer`."""
    lr = optim.lr if muon or optim.muon.adamw_lr is None else optim.muon.adamw_lr
    if not optim.lora_plus:
        return lr
    if ".lora_embedding_" in name:
        return EMBEDDING_LR
    return lr * optim.lora_plus if vector or ".lora_B." in name else lr


def name_of(optimizer: Any) -> str:
    """Name of `optimizer` in recipes.

    Raises:
        TypeError: for one that no recipe can name.
    """
    known = {Muon: "muon", torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}
    for cls, name in known.items():
        if isinstance(optimizer, cls):  # Muon is an AdamW here, and AdamW an Adam, so they come first
            return name
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return "adamw" if optimizer.adam_w_mode else "adam"
    raise TypeError(f"checkpoints hold the state of {', '.join(MOMENTS)}, not of {type(optimizer).__name__}")


def new_state(optimizer: Any, flat: Tensor) -> dict[str, Any]:
    """State of `flat` before the first step: as Adam's and Muon's first step creates it, for SGD a buffer of zeros.

    torch's SGD has no buffer before its first step, which makes the gradient the buffer. With a buffer of zeros it
    computes momentum * 0 + gradient, which are the same numbers (a gradient of -0 becomes 0).
    """
    keys = moments(optimizer, flat)
    state: dict[str, Any] = {key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in keys}
    if MOMENTUM in keys:
        return state
    if isinstance(optimizer, torch.optim.Adam):
        group = optimizer.param_groups[0]
        on_device = group.get("capturable") or group.get("fused")
        step: Any = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
    else:
        step = 0
    return {"step": step, **state}
