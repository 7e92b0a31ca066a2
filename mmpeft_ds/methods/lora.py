"""Plain LoRA from peft itself, placed by the sites: its adapter loads with stock peft alone."""

from __future__ import annotations

from peft import LoraConfig
from torch import nn

from mmpeft_ds.methods._select import select
from mmpeft_ds.sites import Sites


class Lora:
    """q and v of every layer of the text tower, unless `target_modules` says otherwise."""

    peft_type = "LORA"
    Config = LoraConfig
    Tuner = None
    prefix = "lora_"
    mergeable = True

    @staticmethod
    def check(config: LoraConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no tower to attach to."""
        if config.target_modules is None:
            select(sites, None, config.layers_to_transform)

    @staticmethod
    def prepare(config: LoraConfig, model: nn.Module, sites: Sites) -> LoraConfig:
        """Fill `target_modules` with full paths."""
        if config.target_modules is None:
            layers = config.layers_to_transform
            layers = [layers] if isinstance(layers, int) else layers
            chosen = select(sites, None, layers)
            config.target_modules = set(chosen.projections(("q", "v")))
            config.layers_to_transform = None  # the paths say it already
            config.fan_in_fan_out = any(s.fused for s in chosen.attention)
        return config

    @staticmethod
    def kinds(names: list[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"peft": [], "norm": [], "bias": [], "head": []}
        for name in names:
            found["peft" if ".lora_" in name else "bias" if name.endswith("base_layer.bias") else "head"].append(name)
        return found


ENTRY = Lora
