"""The peft tuner of p-Adapter: ends of attention and feed-forward sublayers."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.select import select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.p_adapter.attention_graph import check_published
from mmpeft_ds.methods.p_adapter.config import PAdapterConfig
from mmpeft_ds.methods.p_adapter.layer import (
    AttentionBranch,
    AttentionLayer,
    BranchLayer,
    FFNBranch,
    FFNLayer,
    factory_of,
    node_channels,
)
from mmpeft_ds.methods.p_adapter.options import PAdapterOptions
from mmpeft_ds.sites import AttentionSite, FFNSite, Sites, find_sites
from mmpeft_ds.sites.observe import check_observable


class PAdapterModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `PAdapterConfig`."""

    prefix = "p_adapter"

    @classmethod
    def unmergeable(cls, config: PAdapterConfig) -> str:
        return "its branches depend on the attention map."

    def places(self, config: PAdapterConfig, model: nn.Module) -> dict[str, AttentionSite | FFNSite]:
        """The site that ends at each path."""
        sites = {site.end: site for site in checked(config, find_sites(model))}
        for site in sites.values():
            if isinstance(site, AttentionSite):
                check_observable(model.get_submodule(site.path), site)
        return sites

    def wrap(self, config: PAdapterConfig, adapter_name: str, target: nn.Module, place: Any, path: str) -> nn.Module:
        attention = isinstance(place, AttentionSite)
        last = place.out if attention else place.down
        factory = factory_of(self.model.get_submodule(last.path))
        if attention:
            branch = AttentionBranch(place, last.width, config, **factory)
        else:
            branch = FFNBranch(place.up.in_width, last.width, config, **factory)
        layer = target if isinstance(target, BranchLayer) else self._layer(adapter_name, target, place)
        layer.add(adapter_name, branch, config)
        return layer

    def _layer(self, adapter_name: str, target: nn.Module, place: AttentionSite | FFNSite) -> BranchLayer:
        around = self.model.get_submodule(place.path)
        if isinstance(place, AttentionSite):
            return AttentionLayer(target, adapter_name, around, place)
        return FFNLayer(target, adapter_name, around, self.model.get_submodule(place.up.path), place)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        layers = [m for m in self.model.modules() if isinstance(m, BranchLayer)]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in layers:
            layer.detach()
        return model


class PAdapter(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = PAdapterOptions
    Config = PAdapterConfig
    Tuner = PAdapterModel

    @classmethod
    def check(cls, config: PAdapterConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse what cannot work on these sites; p-adapter needs no condition. Raises BadInput."""
        checked(config, sites)

    @classmethod
    def observes_attention(cls, config: PAdapterConfig) -> bool:
        """The graph of an attention block is made of its scores."""
        return bool({"self", "cross"} & set(config.sublayers))

    @classmethod
    def decays(cls, config: PAdapterConfig, name: str) -> bool:
        """p and m are vectors, which the engine does not decay; `decay_p` asks for it."""
        return config.decay_p and name.endswith((".graph.p", ".graph.m"))


def checked(config: PAdapterConfig, sites: Sites) -> list[AttentionSite | FFNSite]:
    """The sublayers that get an adapter, in order.

    Raises:
        BadInput: no such tower, layer or sublayer, a reduction that does not divide, or a mode that would look ahead.
    """
    chosen = select(sites, config.tower, config.layers)
    attention = [s for s in chosen.attention if ("cross" if s.cross else "self") in config.sublayers]
    ffn = chosen.ffn if "ffn" in config.sublayers else []
    if not attention and not ffn:
        raise BadInput(
            f"sublayers: tower {', '.join(map(repr, chosen.towers))} has none of {', '.join(config.sublayers)}."
        )
    causal = {s.tower for s in sites.attention if s.causal}
    for site in attention:
        if config.mode == "published":
            check_published(site.tower in causal, site.tower)
        node_channels(site, site.out.width, config)
    for site in ffn:
        if site.up.in_width < config.r2:
            raise BadInput(
                f"r2: {config.r2} leaves no bottleneck beside {site.path}, which is {site.up.in_width} wide."
            )
    return [*attention, *ffn]


ENTRY = PAdapter
