"""The peft tuner of routed adapters: wraps the ends of the chosen sublayers, and norms."""

from __future__ import annotations

from torch import nn

from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.bottleneck import Sublayer, activation_of, sublayers
from mmpeft_ds.methods.common.layers import TrainedNorm
from mmpeft_ds.methods.common.routed import check_condition, selected
from mmpeft_ds.methods.common.select import norms_like
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.routed_adapter.config import RoutedAdapterConfig
from mmpeft_ds.methods.routed_adapter.layer import AdapterPlace, RoutedAdapterLayer
from mmpeft_ds.methods.routed_adapter.options import RoutedAdapterOptions
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.base import base_layer


class RoutedAdapterModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `RoutedAdapterConfig`."""

    prefix = "routed_adapter"

    @classmethod
    def unmergeable(cls, config: RoutedAdapterConfig) -> str:
        return "a bottleneck with a non-linearity is no change of a weight."

    def places(self, config: RoutedAdapterConfig, model: nn.Module) -> dict[str, AdapterPlace | None]:
        """Places of adapters; None for a norm."""
        sites = find_sites(model)
        order = {path: i for i, (path, _) in enumerate(model.named_modules())}
        named = config.train_norms
        chosen = selected(config, sites, cross_only=False)
        norms = norms_like(model, named) if isinstance(named, list) else chosen.norms() if named else []
        return dict.fromkeys(norms) | adapter_places(config, sites, order)

    def wrap(
        self,
        config: RoutedAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        place: AdapterPlace | None,
        path: str,
    ) -> nn.Module:
        if place is None:
            norm = target if isinstance(target, TrainedNorm) else TrainedNorm(target, adapter_name, self.prefix)
            norm.update_layer(adapter_name, config)
            return norm
        layer = target
        if not isinstance(target, RoutedAdapterLayer):
            layer = RoutedAdapterLayer(target, adapter_name, path)
        # a dropout has no parameters: device and dtype are those of a projection
        like = base_layer(self.model.get_submodule(place.like)).weight
        owner = None if place.owner == path else self.model.get_submodule(place.owner)
        layer.update_layer(adapter_name, place, config, like, owner)
        return layer


class RoutedAdapter(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = RoutedAdapterOptions
    Config = RoutedAdapterConfig
    Tuner = RoutedAdapterModel

    @classmethod
    def check(cls, config: RoutedAdapterConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse what cannot work on these sites with a condition of this width (None: no condition).

        Raises:
            BadInput: no such tower, layer or sublayer, no condition or another width, an unknown non-linearity, or a
                route that leaks future tokens.
        """
        widths = {path: place.width for path, place in adapter_places(config, sites).items()}
        check_condition(config, widths, condition_width)

    @classmethod
    def unpackable(cls, config: RoutedAdapterConfig, attention: str) -> str | None:
        """A layer that pools or mixes its own tokens would take those of all texts of a row."""
        return None if config.tokenwise else "this route mixes all tokens of a row."


def adapter_places(
    config: RoutedAdapterConfig, sites: Sites, order: dict[str, int] | None = None
) -> dict[str, AdapterPlace]:
    """The place after each chosen sublayer, by the path of its last module.

    Args:
        order: of all module paths, in which the tuner wraps them; the first of a layer owns a shared adapter.

    Raises:
        BadInput: as `RoutedAdapter.check`, but for the condition.
    """
    chosen = selected(config, sites, cross_only=False)
    block = {s.end: s.block for s in (*chosen.attention, *chosen.ffn)}
    causal = {s.block for s in chosen.attention if s.causal}
    adapted = sublayers(chosen, config.after)
    if order is not None:
        adapted.sort(key=lambda sublayer: order[sublayer.end])
    owners: dict[str, str] = {}

    def place(sublayer: Sublayer) -> AdapterPlace:
        end = sublayer.end
        published = block[end] in causal
        shared = published if config.shared is None else config.shared
        return AdapterPlace(
            width=sublayer.width,
            activation=activation_of(config.activation, sublayer),
            residual=published if config.residual is None else config.residual,
            like=sublayer.first,
            owner=owners.setdefault(block[end], end) if shared else end,
        )

    return {sublayer.end: place(sublayer) for sublayer in adapted}


ENTRY = RoutedAdapter
