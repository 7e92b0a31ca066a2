"""Plain LoRA from peft itself, placed by the sites: its adapter loads with stock peft alone."""

from __future__ import annotations

from peft import LoraConfig
from torch import nn

from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.select import Selection, default_selection, stored_in_by_out
from mmpeft_ds.methods.lora.options import LoraOptions
from mmpeft_ds.sites import Sites


class Lora(SiteMethod):
    """q and v of every layer of the text towers, unless `target_modules` says otherwise."""

    Options = LoraOptions
    Config = LoraConfig
    peft_type = "LORA"
    prefix = "lora_"

    @classmethod
    def check(cls, config: LoraConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no tower to attach to."""
        if config.target_modules is None:
            _chosen(config, sites)

    @classmethod
    def prepare(cls, config: LoraConfig, model: nn.Module, sites: Sites) -> LoraConfig:
        """Fill `target_modules` with full paths."""
        if config.target_modules is None:
            chosen = _chosen(config, sites)
            config.target_modules = set(chosen.projections(("q", "v")))
            config.layers_to_transform = None  # the paths say it already
            config.fan_in_fan_out = stored_in_by_out(model, config.target_modules)
        return config

    @classmethod
    def kind(cls, name: str) -> str:
        """As every method; with `bias: all` or `lora_only` peft trains the biases of the frozen layers themselves."""
        return "bias" if name.endswith("base_layer.bias") else super().kind(name)


def _chosen(config: LoraConfig, sites: Sites) -> Selection:
    layers = config.layers_to_transform
    return default_selection(sites, [layers] if isinstance(layers, int) else layers)


ENTRY = Lora
