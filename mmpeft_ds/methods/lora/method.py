"""Plain LoRA from peft itself, placed by the sites: its adapter loads with stock peft alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.select import Selection, default_selection, stored_in_by_out
from mmpeft_ds.methods.lora import layer, start
from mmpeft_ds.methods.lora.options import REWRITING, LoraOptions
from mmpeft_ds.recipe.parse import Origin
from mmpeft_ds.sites import Sites


class Lora(SiteMethod):
    """q and v of every layer of the text towers, unless `target_modules` says otherwise.

    On a base of half precision peft's unmerging, and disabling while merged, leave a third to a half of the adapted
    weights changed, and a fresh DoRA (`use_dora`) changes the outputs.
    """

    Options = LoraOptions
    Config = LoraConfig
    peft_type = "LORA"
    prefix = "lora_"

    @classmethod
    def config(cls, options: LoraOptions, origin: Origin) -> LoraConfig:
        """As every method's; peft's own type of `init_lora_weights` knows no `pissa_niter_4`."""
        if not REWRITING.fullmatch(str(options.init_lora_weights)):
            return super().config(options, origin)
        config = super().config(dataclasses.replace(options, init_lora_weights=True), origin)
        config.init_lora_weights = options.init_lora_weights
        return config

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
            config.layers_to_transform = config.layers_pattern = None  # the paths say it already
            config.fan_in_fan_out = stored_in_by_out(model, config.target_modules)
        return config

    @classmethod
    def attach(cls, config: LoraConfig, model: nn.Module) -> PeftModel:
        """As peft does it, but `pissa` and `olora` leave the frozen weights alone (see `start`), and a Linear and its
        low-rank term are computed by one function (see `layer`)."""
        given = config.init_lora_weights
        if not REWRITING.fullmatch(str(given)):
            wrapped = super().attach(config, model)
            layer.use_one_function(wrapped)
            return wrapped
        plain = copy.copy(config)
        plain.init_lora_weights = True
        wrapped = super().attach(plain, model)
        start.begin(wrapped, str(given))
        return wrapped

    @classmethod
    def saved_tensors(cls, model: PeftModel, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of `pissa` and `olora` the factors of a plain LoRA: what was trained less its start."""
        return start.joined(model, trained)

    @classmethod
    def saved_fields(cls, config: LoraConfig) -> dict[str, Any]:
        """Of `pissa` and `olora` those of a plain LoRA of twice the rank and the same scale."""
        return start.plain_fields(config) if REWRITING.fullmatch(str(config.init_lora_weights)) else {}

    @classmethod
    def kind(cls, name: str) -> str:
        """As every method; with `bias: all` or `lora_only` peft trains the biases of the frozen layers themselves."""
        return "bias" if name.endswith("base_layer.bias") else super().kind(name)


def _chosen(config: LoraConfig, sites: Sites) -> Selection:
    layers = config.layers_to_transform
    return default_selection(sites, [layers] if isinstance(layers, int) else layers)


ENTRY = Lora
