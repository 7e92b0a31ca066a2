"""Adapters of all towers with one `down`: UniAdapter (Lu et al., ICLR 2024, arXiv 2302.06605)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from mmpeft_ds.methods.common.bottleneck import (
    ACTIVATIONS,
    SUBLAYERS,
    BottleneckLayer,
    Sublayer,
    activation_of,
    sublayers,
)
from mmpeft_ds.methods.common.config import SiteConfig
from mmpeft_ds.methods.common.select import select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.base import base_layer


@dataclass
class UniAdapterConfig(SiteConfig):
    """`scale * up(activation(down(t)))` added to the output t of a sublayer; `down` is shared by all places of one
    width in one layer (or in all layers), `up` is of each place its own."""

    PEFT_TYPE: ClassVar[str] = "UNI_ADAPTER"

    tower: str | list[str] | None = field(
        default=None,
        metadata={"help": "Path of the tower, or `text` or `image`, or a list of these; default all towers."},
    )
    r: int = field(default=128, metadata={"help": "Width of the bottleneck."})
    share: Literal["layer", "all"] = field(
        default="layer",
        metadata={"help": "One `down` for each layer index, or for the whole model; always one for each width."},
    )
    after: list[str] | None = field(
        default=None,
        metadata={"help": "Which sublayers: self, cross, ffn; default the attention sublayers that there are."},
    )
    activation: str | None = field(
        default=None, metadata={"help": "Non-linearity (gelu, relu, silu, ...); default that of the backbone."}
    )
    scale: float = field(default=1.0, metadata={"help": "Factor of what is added."})
    near_identity: bool = field(
        default=True,
        metadata={"help": "`up` starts at zero, so the model starts as the frozen one; else from N(0, 0.02)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("r", 1)
        self._one_of("share", ("layer", "all"))
        if self.after is not None:
            self._some_of("after", SUBLAYERS)
        if self.activation is not None:
            self._one_of("activation", tuple(ACTIVATIONS))


class UniAdapterModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `UniAdapterConfig`."""

    prefix = "uni_adapter"
    unmergeable = "a bottleneck with a non-linearity is no change of a weight."

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


class UniAdapter:
    """The method entry: what recipes and the engine use."""

    peft_type = UniAdapterConfig.PEFT_TYPE
    Config = UniAdapterConfig
    Tuner = UniAdapterModel
    prefix = UniAdapterModel.prefix
    mergeable = False

    @staticmethod
    def check(config: UniAdapterConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower, layer or sublayer, or no such activation."""
        _places(config, sites)

    @staticmethod
    def prepare(config: UniAdapterConfig, model: nn.Module, sites: Sites) -> UniAdapterConfig:
        """The config as it is: the tuner finds its places by itself."""
        return config

    @staticmethod
    def kinds(names: list[str]) -> dict[str, list[str]]:
        """Parameter names by what they are: `peft` or `head`."""
        found: dict[str, list[str]] = {"peft": [], "norm": [], "bias": [], "head": []}
        for name in names:
            found["peft" if ".uni_adapter_" in name else "head"].append(name)
        return found


def _places(config: UniAdapterConfig, sites: Sites) -> list[Sublayer]:
    chosen = select(sites, config.tower or list(sites.towers) or None, config.layers)
    after = config.after or ["self", *(["cross"] if any(s.cross for s in chosen.attention) else [])]
    places = sublayers(chosen, after)
    for place in places:
        activation_of(config.activation, place)
    return places


ENTRY = UniAdapter
