"""The peft tuner of deep prompts: which leaves hold them, and which modules are hooked."""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.calls import BOUND, parameters
from mmpeft_ds.methods.common.select import Selection, select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.deep_prompt.config import DeepPromptConfig
from mmpeft_ds.methods.deep_prompt.layer import (
    Hooked,
    Passage,
    PrefixedRows,
    PrefixedSelfAttention,
    PromptedBlock,
    PromptLayer,
)
from mmpeft_ds.methods.deep_prompt.options import DeepPromptOptions
from mmpeft_ds.sites import AttentionSite, Sites, find_sites
from mmpeft_ds.sites.base import base_layer

# What models ask their cache of states of convolutions and of an indexer of keys.
_VERBS = re.compile(r"past_key_values\.((?:get|update)_(?:conv_state|recurrent_state|indexer))\b")


@dataclass
class Place:
    """A leaf that holds prompts.

    Attributes:
        parts: (first output feature, width) of each of its parts: "key", "value", "token".
        hooked: path of the attention module or layer that it belongs to.
        passage: of tokens.
    """

    parts: dict[str, tuple[int, int]]
    hooked: str
    passage: Passage | None = None


class DeepPromptModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `DeepPromptConfig`."""

    prefix = "deep_prompt"

    @classmethod
    def unmergeable(cls, config: DeepPromptConfig) -> str:
        return "a prompt is no change of a weight."

    def places(self, config: DeepPromptConfig, model: nn.Module) -> dict[str, Place]:
        chosen = select(find_sites(model), config.tower, config.layers)
        places: dict[str, Place] = {}
        self._hooks: dict[str, Hooked] = {}
        self._borrowed: dict = {}
        if config.style == "vpt":
            self._places_of_tokens(config, chosen, model, places)
        else:
            for site in _attention(config, chosen):
                core = site.q.path.rpartition(".")[0]
                self._hooks[core] = _prefix_hook(model.get_submodule(core), core, site)
                for part, projection in (("key", site.k), ("value", site.v)):
                    place = places.setdefault(projection.path, Place({}, core))
                    place.parts[part] = (projection.start, projection.width)
        return places

    def _places_of_tokens(
        self, config: DeepPromptConfig, chosen: Selection, model: nn.Module, found: dict[str, Place]
    ) -> None:
        for tower in chosen.towers:
            sites = [s for s in chosen.attention if s.tower == tower and not s.cross]
            first, last = sites[0].layer, sites[-1].layer
            if config.depth == "shallow" and len(sites) != last - first + 1:
                raise BadInput(f"layers: tokens that enter once pass every layer from {first} to {last}. Name all.")
            for site in sites:
                _check_tokens(model, site)
                passage = Passage()
                if config.depth == "shallow":
                    passage = Passage(site.layer == first, site.layer == last, deep=False)
                found[site.out.path] = Place({"token": (0, site.out.width)}, site.block, passage)
                self._hooks[site.block] = PromptedBlock(site.block)

    def wrap(
        self, config: DeepPromptConfig, adapter_name: str, target: nn.Module, place: Place, path: str
    ) -> nn.Module:
        if isinstance(target, PromptLayer):
            layer = target
        else:
            hooked = self._hooks[place.hooked]
            if not hooked.layers:
                hooked.attach(self.model.get_submodule(place.hooked))
            layer = PromptLayer(target, adapter_name, place.parts, hooked)
        if not config.shared and (place.passage is None or place.passage.enter):
            self._borrowed = {}
        layer.update_layer(adapter_name, config, base_layer(target).weight, self._borrowed)
        if place.passage is not None:
            layer.hooked.passages[adapter_name] = place.passage
        return layer


class DeepPrompt(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = DeepPromptOptions
    Config = DeepPromptConfig
    Tuner = DeepPromptModel
    tables = (".tokens",)

    @classmethod
    def check(cls, config: DeepPromptConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower, layer or attention."""
        chosen = select(sites, config.tower, config.layers)
        if config.style == "prefix":
            _attention(config, chosen)

    @classmethod
    def unpackable(cls, config: DeepPromptConfig, attention: str) -> str | None:
        """A mask lets every text see the prompts; lengths of texts, which flash-attn takes in its place, do not."""
        return None if attention in ("sdpa", "eager") else "its prompts need engine.attention: sdpa or eager there."


def _attention(config: DeepPromptConfig, chosen: Selection) -> list[AttentionSite]:
    attentions = []
    for kind in config.attention or ("self", "cross"):
        sites = [s for s in chosen.attention if s.cross == (kind == "cross")]
        if not sites and config.attention:
            names = ", ".join(map(repr, chosen.towers))
            raise BadInput(f"attention: tower {names} has no {kind!r} attention. Leave it out.")
        attentions += sites
    return attentions


def _prefix_hook(core: nn.Module, path: str, site: AttentionSite) -> Hooked:
    """The hooks by which a prefix enters this attention module. Raises BadInput if there are none."""
    names = parameters(type(core))
    _check_bound(names, path)
    if site.cross:
        source = "encoder_hidden_states" if "encoder_hidden_states" in names else "key_value_states"
        mask = "encoder_attention_mask" if "encoder_attention_mask" in names else "attention_mask"
        return PrefixedRows(path, rows=True, source=source, mask=mask)
    if "cache_params" in names:
        raise BadInput(f"style: {path} carries a state from token to token in place of keys and values. Use adapters.")
    if "past_key_values" in names:
        if asked := _other_calls(core):
            raise BadInput(f"style: {path} asks its cache for {asked}, of which a prefix has none. Use adapters.")
        return PrefixedSelfAttention(path)
    if "position_embeddings" in names:
        raise BadInput(f"style: {path} rotates its keys and takes no cache, so a prefix has no way in. Use adapters.")
    return PrefixedRows(path, rows=True)


def _other_calls(core: nn.Module) -> str:
    """A verb of its cache that this attention uses and that is not of keys and values; empty if there is none."""
    kinds = {type(module) for module in core.modules()}
    return next(filter(None, map(_other_call, filter(_takes_cache, kinds))), "")


@functools.cache  # to find the source of a class, Python parses its whole file
def _other_call(kind: type[nn.Module]) -> str:
    found = _VERBS.search(inspect.getsource(kind))
    return found[1] if found else ""


def _takes_cache(kind: type[nn.Module]) -> bool:
    return "past_key_values" in parameters(kind)


def _check_tokens(model: nn.Module, site: AttentionSite) -> None:
    """Raise BadInput where tokens cannot stand before those of a layer."""
    core = site.q.path.rpartition(".")[0]
    inner, outer = (parameters(type(model.get_submodule(path))) for path in (core, site.block))
    _check_bound(inner + outer, site.block)
    if "position_embeddings" in inner + outer or (site.causal and "past_key_values" in inner):
        raise BadInput(
            f"style: {site.block} writes with a cache and counts positions by it, so it takes no tokens (vpt). "
            "Use style: prefix."
        )


def _check_bound(names: tuple[str, ...], path: str) -> None:
    for name, why in BOUND.items():
        if name in names:
            raise BadInput(f"style: {path} {why}, which prompts do not fit. Use lora or adapter there.")


ENTRY = DeepPrompt
