"""Plain LoRA from peft itself, placed by the sites: its adapter loads with stock peft alone."""

from __future__ import annotations

from peft import LoraConfig
from torch import nn

from mmpeft_ds.methods.common.select import Selection, default_selection, stored_in_by_out
from mmpeft_ds.sites import Sites


class Lora:
    """q and v of every layer of the text towers, unless `target_modules` says otherwise."""

    peft_type = "LORA"
    Config = LoraConfig
    Tuner = None
    prefix = "lora_"
    mergeable = True

    @staticmethod
    def check(config: LoraConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no tower to attach to."""
        if config.target_modules is None:
            _chosen(config, sites)

    @staticmethod
    def prepare(config: LoraConfig, model: nn.Module, sites: Sites) -> LoraConfig:
        """Fill `target_modules` with full paths."""
        if config.target_modules is None:
            chosen = _chosen(config, sites)
            config.target_modules = set(chosen.projections(("q", "v")))
            config.layers_to_transform = None  # the paths say it already
            config.fan_in_fan_out = stored_in_by_out(model, config.target_modules)
        return config

    @staticmethod
    def kinds(names: list[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"peft": [], "norm": [], "bias": [], "head": []}
        for name in names:
            found["peft" if ".lora_" in name else "bias" if name.endswith("base_layer.bias") else "head"].append(name)
        return found


def _chosen(config: LoraConfig, sites: Sites) -> Selection:
    layers = config.layers_to_transform
    return default_selection(sites, [layers] if isinstance(layers, int) else layers)


ENTRY = Lora
