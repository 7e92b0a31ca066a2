"""The peft tuner of routed LoRA: wraps the chosen projections and norms of a model."""

from __future__ import annotations

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.layers import SiteLayer, TrainedBias, TrainedNorm
from mmpeft_ds.methods.common.routed import check_condition, selected
from mmpeft_ds.methods.common.select import biases_like, norms_like
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.routed_lora.config import RoutedLoraConfig
from mmpeft_ds.methods.routed_lora.layer import Projections, RoutedLoraLinear
from mmpeft_ds.methods.routed_lora.options import RoutedLoraOptions
from mmpeft_ds.sites import Sites, find_sites

# a low-rank path, or the whole norm, or the bias alone
Place = Projections | type[TrainedNorm] | type[TrainedBias]


class RoutedLoraModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `RoutedLoraConfig`."""

    prefix = "routed_lora"

    @classmethod
    def unmergeable(cls, config: RoutedLoraConfig) -> str | None:
        """Without a route it is a change of weights like any LoRA."""
        if not config.routed:
            return None
        return f"it routes by {config.route!r}, so its change depends on the image; train with route: none to merge."

    @classmethod
    def no_lora(cls, config: RoutedLoraConfig) -> str | None:
        """Without a route, and with nothing but low-rank paths trained, it is a LoRA."""
        if reason := cls.unmergeable(config):
            return reason.replace("to merge", "for a LoRA")
        for key in ("train_bias", "train_norms"):
            if getattr(config, key):
                return f"{key}: trained copies of biases and norms are no LoRA; train without, or merge it."
        return None

    def places(self, config: RoutedLoraConfig, model: nn.Module) -> dict[str, Place]:
        """The change of each module."""
        chosen = selected(config, find_sites(model), cross_only=True)
        norms = config.train_norms
        norms = norms_like(model, norms) if isinstance(norms, list) else chosen.norms() if norms else []
        every = isinstance(config.train_bias, list)
        biased = biases_like(model, config.train_bias, "train_bias") if every else []
        places: dict[str, Place] = {path: TrainedBias for path in biased} | dict.fromkeys(norms, TrainedNorm)
        for path, parts in chosen.projections(config.targets).items():
            with_bias = path in biased if every else bool(config.train_bias)
            places[path] = Projections(tuple((p.start, p.width) for p in parts), with_bias)
        return places

    def wrap(
        self, config: RoutedLoraConfig, adapter_name: str, target: nn.Module, place: Place, path: str
    ) -> nn.Module:
        wanted = RoutedLoraLinear if isinstance(place, Projections) else place
        if isinstance(target, SiteLayer) and type(target) is not wanted:
            raise BadInput(
                f"{path}: an earlier adapter of this model is a {type(target).__name__} here, {adapter_name!r} "
                f"would be a {wanted.__name__}. Give both the same targets, train_bias and train_norms."
            )
        if isinstance(place, Projections):
            layer = target if isinstance(target, SiteLayer) else RoutedLoraLinear(target, adapter_name)
            layer.update_layer(adapter_name, place, config, path)
        else:
            layer = target if isinstance(target, SiteLayer) else place(target, adapter_name, self.prefix)
            layer.update_layer(adapter_name, config)
        return layer


class RoutedLora(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = RoutedLoraOptions
    Config = RoutedLoraConfig
    Tuner = RoutedLoraModel

    @classmethod
    def check(cls, config: RoutedLoraConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse what cannot work on these sites with a condition of this width (None: no condition).

        Raises:
            BadInput: no such tower or layer, no condition or another width, or a route that leaks future tokens.
        """
        chosen = selected(config, sites, cross_only=True)
        projections = chosen.projections(config.targets)
        check_condition(config, {path: parts[0].in_width for path, parts in projections.items()}, condition_width)

    @classmethod
    def unpackable(cls, config: RoutedLoraConfig, attention: str) -> str | None:
        """A layer that pools or mixes its own tokens would take those of all texts of a row."""
        return None if config.tokenwise else "this route mixes all tokens of a row."

    @classmethod
    def kind(cls, name: str) -> str:
        """Kind of a parameter; the trained bias of a routed projection is inside its low-rank path."""
        kind = super().kind(name)
        return "bias" if kind == "peft" and name.endswith(".bias") else kind


ENTRY = RoutedLora
