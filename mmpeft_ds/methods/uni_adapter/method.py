"""Adapters of all towers with one `down`: UniAdapter (Lu et al., ICLR 2024, arXiv 2302.06605)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.bottleneck import (
    BottleneckLayer,
    Sublayer,
    activation_of,
    sublayers,
)
from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.common.select import select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.uni_adapter.options import UniAdapterOptions
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.base import base_layer


@dataclass
class UniAdapterConfig(UniAdapterOptions, MethodConfig):
    """UniAdapterOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "UNI_ADAPTER"


class UniAdapterModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `UniAdapterConfig`."""

    prefix = "uni_adapter"

    @classmethod
    def unmergeable(cls, config: UniAdapterConfig) -> str:
        return "a bottleneck with a non-linearity is no change of a weight."

    def places(self, config: UniAdapterConfig, model: nn.Module) -> dict[str, Sublayer]:
        places = {place.end: place for place in _places(config, find_sites(model))}
        self._owners = {}
        return places

    def wrap(
        self, config: UniAdapterConfig, adapter_name: str, target: nn.Module, place: Sublayer, path: str
    ) -> nn.Module:
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target, adapter_name, self.prefix)
        like = base_layer(self.model.get_submodule(place.first)).weight
        group = (place.width, place.layer if config.share == "layer" else None)
        activation, owner = activation_of(config.activation, place), self._owners.get(group)
        layer.update_layer(adapter_name, config, place.width, activation, like, owner=owner)
        self._owners.setdefault(group, layer)
        return layer


class UniAdapter(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = UniAdapterOptions
    Config = UniAdapterConfig
    Tuner = UniAdapterModel

    @classmethod
    def check(cls, config: UniAdapterConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower, layer or sublayer, or no such activation."""
        _places(config, sites)


def _places(config: UniAdapterConfig, sites: Sites) -> list[Sublayer]:
    chosen = select(sites, config.tower or list(sites.towers) or None, config.layers)
    after = config.after or ["self", *(["cross"] if any(s.cross for s in chosen.attention) else [])]
    places = sublayers(chosen, after)
    for place in places:
        activation_of(config.activation, place)
    return places


ENTRY = UniAdapter
