"""Bottleneck adapters after or beside sublayers (Houlsby et al., arXiv 1902.00751; He et al., arXiv 2110.04366).

The "single adapter" of VL-Adapter (arXiv 2112.06825), with the norms that it trains as well, is
`AdapterConfig(tower=["text"], r=96, activation="gelu_new", near_identity=False, train_norms=["*"])` on BART.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.adapter.options import AdapterOptions
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.bottleneck import (
    BottleneckLayer,
    Remember,
    Sublayer,
    activation_of,
    sublayers,
)
from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.common.layers import TrainedNorm
from mmpeft_ds.methods.common.select import norms_like, select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.base import base_layer


@dataclass
class AdapterConfig(AdapterOptions, MethodConfig):
    """AdapterOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "ADAPTER"


class AdapterModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `AdapterConfig`."""

    prefix = "bottleneck"

    @classmethod
    def unmergeable(cls, config: AdapterConfig) -> str:
        return "a bottleneck with a non-linearity is no change of a weight."

    def places(self, config: AdapterConfig, model: nn.Module) -> dict[str, Sublayer | type]:
        chosen = select(find_sites(model), config.tower, config.layers)
        adapted = {place.end: place for place in sublayers(chosen, config.after)}
        for place in adapted.values():
            activation_of(config.activation, place)
        named = config.train_norms
        norms = norms_like(model, named) if isinstance(named, list) else chosen.norms() if named else []
        places = adapted | dict.fromkeys(norms, TrainedNorm)
        if config.style == "parallel":
            for place in adapted.values():
                if place.first in places:
                    raise BadInput(f"style: {place.first} is first and last of its sublayer. Choose sequential.")
            places |= dict.fromkeys((place.first for place in adapted.values()), Remember)
        return places

    def wrap(
        self, config: AdapterConfig, adapter_name: str, target: nn.Module, place: Sublayer | type, path: str
    ) -> nn.Module:
        if place is TrainedNorm:
            layer = target if isinstance(target, TrainedNorm) else TrainedNorm(target, adapter_name, self.prefix)
            layer.update_layer(adapter_name, config)
            return layer
        if place is Remember:
            layer = target if isinstance(target, Remember) else Remember(target, adapter_name)
            layer.update_layer(adapter_name, config)
            return layer
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target, adapter_name, self.prefix)
        # a dropout has no parameters: take device and dtype from the projection before it
        first = self.model.get_submodule(place.first)
        remember = first if config.style == "parallel" else None
        like = base_layer(first).weight
        layer.update_layer(adapter_name, config, place.width, activation_of(config.activation, place), like, remember)
        return layer


class Adapter(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = AdapterOptions
    Config = AdapterConfig
    Tuner = AdapterModel

    @classmethod
    def check(cls, config: AdapterConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower, layer or sublayer, or no such activation."""
        for place in sublayers(select(sites, config.tower, config.layers), config.after):
            activation_of(config.activation, place)


ENTRY = Adapter
