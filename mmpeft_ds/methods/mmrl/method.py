"""The peft tuner of MMRL: the modules that it wraps, and checks of the towers' layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.calls import BOUND, parameters
from mmpeft_ds.methods.common.head import HeadLayer, HeadMethod, HeadTuner, feature_site
from mmpeft_ds.methods.common.text_head import names_and_tokeniser, path_of, tower_of
from mmpeft_ds.methods.mmrl.head import LIVE, Classes, MMRLConfig, MMRLHead
from mmpeft_ds.methods.mmrl.layer import Entrance, Tower, aligners
from mmpeft_ds.methods.mmrl.options import MMRLOptions
from mmpeft_ds.sites import AttentionSite, Sites, find_sites
from mmpeft_ds.sites.base import base_layer


@dataclass(frozen=True)
class Upper:
    """The layers of a tower that get tokens, counted from 0, and their width."""

    layers: range
    width: int


class MMRLTuner(HeadTuner):
    """Tuner that wraps the scorer and the embedding modules of both towers."""

    prefix = "mmrl_"
    head_class = MMRLHead

    def places(self, config: MMRLConfig, model: nn.Module) -> dict[str, Any]:
        sites = find_sites(model)
        site = feature_site(config, sites)
        check_towers(config, sites)
        names, tokenise = names_and_tokeniser("mmrl", model)
        with torch.device("cpu"):  # also for a model on meta, whose sizes are only counted
            made = tokenise([config.template.replace("{}", name) for name in names])
        _refuse_cut(made, names)
        places: dict[str, Any] = {}
        self._towers: dict[str, Tower] = {}
        for reads in ("image", "text"):
            tower = tower_of("mmrl", sites, reads)
            layers = [s for s in sites.attention if s.tower == tower and not s.cross]
            _check_layers(model, layers)
            module = model.get_submodule(tower)
            norm = _final_norm(module, tower, model.encoder.config) if reads == "image" else None
            path = path_of(model, module.get_input_embeddings())
            self._towers[path] = Tower(tower, [s.block for s in layers], layers[0].causal, reads, norm)
            first = config.first_text_layer if reads == "text" else None
            places[path] = Upper(range((first or config.first_layer) - 1, len(layers)), layers[0].in_width)
        width = next(s.in_width for s in sites.attention if s.modality == "image")
        places[site.path] = Classes(model.encoder, dict(made), model.trained_classes, width)
        return places

    def wrap(self, config: MMRLConfig, adapter_name: str, target: nn.Module, place: Any, path: str) -> nn.Module:
        if isinstance(place, Classes):  # the first module that is met, before those of the encoder
            layer = target if isinstance(target, HeadLayer) else HeadLayer(target, adapter_name, self.prefix)
            head = layer.heads[adapter_name] = MMRLHead(config, base_layer(layer), place, adapter_name)
            self._space = head.space
        else:
            if isinstance(target, Entrance):
                layer = target
            else:
                layer = Entrance(target, adapter_name, self._towers[path].attach(self.model))
            like = next(base_layer(layer).parameters())
            layer.mmrl_aligner[adapter_name] = aligners(place.layers, config.width, place.width, like)
            layer.spaces[adapter_name] = self._space
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)
        return layer


class MMRL(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = MMRLOptions
    Config = MMRLConfig
    Tuner = MMRLTuner
    reads_names = True

    @classmethod
    def check(cls, config: MMRLConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput if there are no features, no two encoders, too few layers, or stored images."""
        site = feature_site(config, sites)
        check_towers(config, sites)
        if not site.live_images:
            raise BadInput(f"mmrl: {LIVE}. Set backbone.images: live, and name data with pictures.")


def check_towers(config: MMRLConfig, sites: Sites) -> None:
    """Raise BadInput unless there is one tower of each kind, with the first layer that tokens enter."""
    for reads, first, key in (
        ("image", config.first_layer, "first_layer"),
        ("text", config.first_text_layer or config.first_layer, "first_text_layer"),
    ):
        tower = tower_of("mmrl", sites, reads)
        layers = sum(s.tower == tower and not s.cross for s in sites.attention)
        if first > layers:
            raise BadInput(f"mmrl: {key}: {first}, but the {reads} tower has {layers} layers. Use 1 to {layers}.")


def _check_layers(model: nn.Module, layers: list[AttentionSite]) -> None:
    """Raise BadInput where tokens cannot enter these layers."""
    for site in layers:
        core = site.q.path.rpartition(".")[0]
        names = {n for path in (core, site.block) for n in parameters(type(model.get_submodule(path)))}
        bound = {**BOUND, "position_embeddings": "rotates its keys by their positions"}
        for name, why in bound.items():
            if name in names:
                raise BadInput(f"mmrl: {site.block} {why}, which tokens from outside do not fit. Use CLIP, or a ViT.")


def _refuse_cut(made: Any, names: list[str]) -> None:
    """Raise BadInput where the text of a class is longer than the text tower takes."""
    cut = getattr(made, "changes", None)
    if cut is not None and bool((cut[:, 0] > 0).any()):
        raise BadInput(
            f"mmrl: template: the text of class {names[int(cut[:, 0].argmax())]!r} is longer than the text tower "
            "takes. Shorten it, or use a larger max_text_length."
        )


def _final_norm(tower: nn.Module, path: str, config: Any) -> nn.Module | None:
    """The norm between the last layer and the feature; None if there is none."""
    if not getattr(config, "vision_norm", True) and getattr(config, "vision_feature", "pooler") != "pooler":
        return None
    norms = [child for child in tower.children() if "Norm" in type(child).__name__]
    if not norms:
        raise BadInput(f"mmrl: {path} has no norm after its last layer. Use a CLIP, or a ViT-like tower.")
    return norms[-1]


ENTRY = MMRL
