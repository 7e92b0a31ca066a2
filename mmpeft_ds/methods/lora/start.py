"""LoRA that starts from the frozen weights: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

Both begin with factors `up_0 down_0` of the frozen weight W. peft subtracts them from W, so that what it trains does
not fit the base as it is, and cannot be loaded exactly in half precision. Here W stays as it is, and the low-rank term
subtracts its own start:

    W x + scale (up down - up_0 down_0) x

which is the same function of the trained factors. It is a plain LoRA with the factors [up, -up_0] and [down; down_0]
of twice the rank, and as such it is saved: peft alone loads it, and the outputs are equal.
"""

# r rank, I width of the input, O width of the output

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
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
    for path, layer in list(model.named_modules()):
        if isinstance(layer, lora.LoraLayer):
            _check(layer, path.removeprefix("base_model.model."), name, init)
            down, up = _factors(layer, name, init)
            layer.lora_A[name], layer.lora_B[name] = Factor(down, up=False), Factor(up, up=True)


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
    }


def _check(layer: lora.LoraLayer, path: str, name: str, init: str) -> None:
    if not isinstance(layer, lora.Linear) or (init == "olora" and layer.fan_in_fan_out):
        kind = type(layer.get_base_layer()).__name__
        raise BadInput(
            f"init_lora_weights: {init} cannot start at {path} ({kind}). Use true, or other target_modules."
        )
    width = min(layer.in_features, layer.out_features)
    if layer.r[name] > width:
        raise BadInput(f"r: {layer.r[name]} is more than the {width} singular values of {path}. Use less.")


def _factors(layer: lora.Linear, name: str, init: str) -> tuple[Tensor, Tensor]:
    """`down_0` (r, I) and `up_0` (O, r), from rank 0, so that they are equal on all ranks."""
    weight = layer.get_base_layer().weight
    factors = (layer.lora_A[name], layer.lora_B[name])
    if weight.is_meta:
        return tuple(factor.weight.detach() for factor in factors)

    def computed() -> list[Tensor]:
        frozen = weight.data
        weight.data = frozen.clone()  # peft subtracts the start from it
        try:
            if init == "olora":
                layer.olora_init(name)
            else:
                layer.pissa_init(name, init)
        finally:
            weight.data = frozen
        return [factor.weight.detach().float().cpu() for factor in factors]

    # The generator is left as it was: only rank 0 draws.
    with gathered([weight]), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        down, up = (factor.to(weight.device) for factor in on_rank0(computed))
    return down, up
