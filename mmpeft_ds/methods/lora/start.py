"""LoRA that starts from the frozen weights: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

Both start with factors `up_0 down_0` of the frozen weight W. peft subtracts their product from W, so that its adapter
does not fit the original base, and cannot be restored exactly in half precision. Here W stays unchanged, and the
low-rank term subtracts its own start:

    W x + scale (up down - up_0 down_0) x

which is the same function of the trained factors. It equals a plain LoRA of twice the rank with the factors
[up, -up_0] and [down; down_0], and is saved as such: peft can load it without this package, with equal outputs.
"""

# r rank, I width of the input, O width of the output

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.layers import KeepsBuffers


class Factor(KeepsBuffers, nn.Linear):
    """One factor of a low-rank term that subtracts its start.

    Args:
        start: (r, I) of `down`, (O, r) of `up`, float32; the trained weight begins as a copy.
        up: which of the two it is.
    """

    kept = ("start",)

    def __init__(self, start: Tensor, up: bool):
        super().__init__(start.shape[1], start.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(start.clone())
        self.up = up
        self.register_buffer("start", start.clone(), persistent=False)

    def begin_at(self, start: Tensor) -> None:
        """Start again, from a tensor of the same shape."""
        self.weight.data, self.start = start.clone(), start.clone()

    def joined(self, weight: Tensor) -> Tensor:
        """`weight` and the start as one factor: (2r, I) of `down`, (O, 2r) of `up`."""
        start = self.start.to(weight)
        return torch.cat([weight, -start], 1) if self.up else torch.cat([weight, start])

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.joined(self.weight))


def begin(model: PeftModel, init: str) -> None:
    """Give every LoRA layer of `model` the start of the name `init`, as peft computes it. Collective.

    Raises:
        BadInput: a layer is no Linear or Conv1D, or is narrower than the rank.
    """
    name = model.active_adapter
    for path, layer in list(layers(model)):
        check(layer, path, name, init)
        compute = layer.olora_init if init == "olora" else functools.partial(layer.pissa_init, init_lora_weights=init)
        down, up = factors(layer, name, functools.partial(compute, name))
        layer.lora_A[name], layer.lora_B[name] = Factor(down, up=False), Factor(up, up=True)


def place(model: PeftModel, init: str) -> None:
    """Let every LoRA layer of `model` subtract its present values as its start; the final start, which depends on
    data, is set later.

    Raises:
        BadInput: a layer cannot start by `init`.
    """
    name = model.active_adapter
    for path, layer in list(layers(model)):
        check(layer, path, name, init)
        down, up = (factor[name].weight.detach() for factor in (layer.lora_A, layer.lora_B))
        layer.lora_A[name], layer.lora_B[name] = Factor(down, up=False), Factor(up, up=True)


def layers(model: PeftModel) -> Iterator[tuple[str, lora.LoraLayer]]:
    """Path below the base model, and layer."""
    for path, layer in model.named_modules():
        if isinstance(layer, lora.LoraLayer):
            yield path.removeprefix("base_model.model."), layer


def joined(model: PeftModel, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """`trained`, with the start joined to each factor that has one, as `SiteMethod.saved_tensors`."""
    factors = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, Factor)}
    return {name: factors[name].joined(w) if name in factors else w for name, w in trained.items()}


def plain_fields(config: LoraConfig) -> dict[str, Any]:
    """Fields of the config of the joined factors, as `SiteMethod.saved_fields`."""
    # The scale stays: it is alpha / r, or with use_rslora alpha / sqrt(r).
    grown = 2**0.5 if config.use_rslora else 2
    return {
        "init_lora_weights": True,
        "r": 2 * config.r,
        "rank_pattern": {path: 2 * r for path, r in (config.rank_pattern or {}).items()},
        "lora_alpha": grown * config.lora_alpha,
        "alpha_pattern": {path: grown * alpha for path, alpha in (config.alpha_pattern or {}).items()},
        "corda_config": None,
        "lora_ga_config": None,
    }


@torch.no_grad()
def pair(layer: BaseTunerLayer, path: str, name: str) -> tuple[Tensor, Tensor]:
    """`down` and `up` of a layer, joined with their start and with the scale in `up`, as `SiteMethod.lora_pairs`."""
    kind = f"{type(layer).__name__} around a {type(layer.get_base_layer()).__name__}"
    if not isinstance(layer, lora.LoraLayer) or name in layer.lora_variant or name not in layer.lora_A:
        raise BadInput(f"{path}: a {kind} is no plain LoRA.")
    both = (layer.lora_A[name], layer.lora_B[name])
    if both[0].weight.dim() != 2 or any(factor.bias is not None for factor in both):
        raise BadInput(f"{path}: a {kind} is no LoRA of a linear layer without bias.")
    down, up = (factor.joined(factor.weight) if isinstance(factor, Factor) else factor.weight for factor in both)
    return down, up * layer.scaling[name]


def check(layer: lora.LoraLayer, path: str, name: str, init: str) -> None:
    """Raise BadInput where a layer cannot start so."""
    if type(layer.get_base_layer().weight) is not nn.Parameter:
        raise BadInput(
            f"init_lora_weights: {init} starts from float weights, and those of {path} are "
            "quantised. Use true, or backbone.quantise: none."
        )
    if not isinstance(layer, lora.Linear) or (init == "olora" and layer.fan_in_fan_out):
        kind = type(layer.get_base_layer()).__name__
        raise BadInput(
            f"init_lora_weights: {init} cannot start at {path} ({kind}). Use true, or other target_modules."
        )
    check_numbers(layer, path, name, init)


def check_numbers(layer: lora.LoraLayer, path: str, name: str, init: str) -> None:
    """Raise BadInput where the rank or the scale of a layer leaves no room for a start from singular vectors."""
    r, width = layer.r[name], min(layer.in_features, layer.out_features)
    if r > width:
        raise BadInput(f"r: {r} is more than the {width} singular values of {path}. Use less.")
    if init == "lora_ga" and 2 * r > width:
        raise BadInput(
            f"r: {r}, and init_lora_weights: lora_ga starts from twice as many singular vectors, which is more than "
            f"the {width} of {path}. Use {width // 2} or less."
        )
    if not layer.scaling[name]:
        raise BadInput(f"lora_alpha: 0 leaves out the term of {path}, which cannot start by {init}. Use more.")


def factors(layer: lora.Linear, name: str, compute: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """`down_0` (r, I) and `up_0` (O, r), from rank 0, so that they are equal on all ranks. Collective.

    Args:
        compute: sets the factors of `layer`, and subtracts them from its frozen weight.
    """
    weight = layer.get_base_layer().weight
    both = (layer.lora_A[name], layer.lora_B[name])
    if weight.is_meta:
        return tuple(factor.weight.detach() for factor in both)

    def computed() -> list[Tensor]:
        frozen = weight.data
        weight.data = frozen.clone()  # peft subtracts the start from it
        try:
            with torch.no_grad():
                compute()
        finally:
            weight.data = frozen
        return [factor.weight.detach().float().cpu() for factor in both]

    # The generator is left as it was: only rank 0 draws.
    with gathered([weight]), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        down, up = (factor.to(weight.device) for factor in on_rank0(computed))
    return down, up
