"""Bottleneck adapters behind or beside sublayers (Houlsby et al., arXiv 1902.00751; He et al., arXiv 2110.04366).

The "single adapter" of VL-Adapter (arXiv 2112.06825), with the norms that it trains as well, is
`AdapterConfig(tower=["text"], r=96, activation="gelu_new", near_identity=False, train_norms=["*"])` on BART.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.bottleneck import (
    ACTIVATIONS,
    SUBLAYERS,
    BottleneckLayer,
    Remember,
    Sublayer,
    activation_of,
    sublayers,
)
from mmpeft_ds.methods.common.config import SiteConfig
from mmpeft_ds.methods.common.layers import TrainedNorm
from mmpeft_ds.methods.common.select import norms_like, select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.base import base_layer


@dataclass
class AdapterConfig(SiteConfig):
    """`scale * up(activation(down(t)))` added to the output of a sublayer, before the residual add; t is that output
    (`sequential`) or the sublayer's input (`parallel`)."""

    PEFT_TYPE: ClassVar[str] = "ADAPTER"

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    style: Literal["sequential", "parallel"] = field(
        default="sequential",
        metadata={"help": "Behind the sublayer, residual inside; or beside it, reading what its first layer does."},
    )
    after: list[str] | None = field(
        default=None,
        metadata={"help": "Which sublayers: self, cross, ffn; default all that the chosen layers have."},
    )
    activation: str | None = field(
        default=None,
        metadata={"help": "Non-linearity (gelu, gelu_new, relu, silu, ...); default that of the backbone."},
    )
    scale: float = field(default=1.0, metadata={"help": "Factor of what is added."})
    near_identity: bool = field(
        default=True,
        metadata={"help": "`up` starts at zero, so the model starts as the frozen one; else from N(0, 0.02)."},
    )
    train_norms: bool | list[str] = field(
        default=False,
        metadata={"help": "Train copies of the norms of the chosen layers, or of those matching full-path patterns."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("r", 1)
        self._one_of("style", ("sequential", "parallel"))
        if self.after is not None:
            self._some_of("after", SUBLAYERS)
        if self.activation is not None:
            self._one_of("activation", tuple(ACTIVATIONS))


class AdapterModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `AdapterConfig`."""

    prefix = "bottleneck"
    unmergeable = "a bottleneck with a non-linearity is no change of a weight."

    def places(self, config: AdapterConfig, model: nn.Module) -> dict[str, Sublayer | type]:
        chosen = select(find_sites(model), config.tower, config.layers)
        found = {place.end: place for place in sublayers(chosen, config.after)}
        for place in found.values():
            activation_of(config.activation, place)
        named = config.train_norms
        norms = norms_like(model, named) if isinstance(named, list) else chosen.norms() if named else []
        places = found | dict.fromkeys(norms, TrainedNorm)
        if config.style == "parallel":
            for place in found.values():
                if place.first in places:
                    raise BadInput(f"style: {place.first} is first and last of its sublayer. Choose sequential.")
            places |= dict.fromkeys((place.first for place in found.values()), Remember)
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


class Adapter:
    """The method entry: what recipes and the engine use."""

    peft_type = AdapterConfig.PEFT_TYPE
    Config = AdapterConfig
    Tuner = AdapterModel
    prefix = AdapterModel.prefix
    mergeable = False

    @staticmethod
    def check(config: AdapterConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower, layer or sublayer, or no such activation."""
        for place in sublayers(select(sites, config.tower, config.layers), config.after):
            activation_of(config.activation, place)

    @staticmethod
    def prepare(config: AdapterConfig, model: nn.Module, sites: Sites) -> AdapterConfig:
        """The config as it is: the tuner finds its places by itself."""
        return config

    @staticmethod
    def kinds(names: list[str]) -> dict[str, list[str]]:
        """Parameter names by what they are: `peft`, `norm` or `head`."""
        found: dict[str, list[str]] = {"peft": [], "norm": [], "bias": [], "head": []}
        for name in names:
            norm, own = ".bottleneck_norm." in name, ".bottleneck_" in name
            found["norm" if norm else "peft" if own else "head"].append(name)
        return found


ENTRY = Adapter
