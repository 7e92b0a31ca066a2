"""The peft tuner of Aurora: which leaves it wraps, with which of the shared factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.aurora.config import AuroraConfig
from mmpeft_ds.methods.aurora.layer import (
    AttentionEnd,
    AuroraLinear,
    Captured,
    Factors,
    GatedEnd,
    LinearPlace,
    NormPlace,
)
from mmpeft_ds.methods.aurora.options import AuroraOptions
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.select import no_known_family
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.sites import AttentionSite, FFNSite, Projection, Sites, find_sites

Place = LinearPlace | NormPlace


class AuroraModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `AuroraConfig`."""

    prefix = "aurora"

    def places(self, config: AuroraConfig, model: nn.Module) -> dict[str, Place]:
        """Every adapted leaf and, where there are gates, three norms of each layer."""
        self._shared: dict[Any, Factors] = {}  # of the adapter that is being added
        return places(config, find_sites(model))

    @classmethod
    def no_lora(cls, config: AuroraConfig) -> str | None:
        """Only gates are in the way; where `gates` is not set, the layers tell whether there are some."""
        return "its gates are no change of a weight; train with gates: false." if config.gates else None

    def wrap(self, config: AuroraConfig, adapter_name: str, target: nn.Module, place: Place, path: str) -> nn.Module:
        if isinstance(place, LinearPlace):
            layer = target if isinstance(target, AuroraLinear) else AuroraLinear(target, adapter_name, place)
            layer.update_layer(adapter_name, place, config, self._shared, path)
        elif place.role == "end":
            layer = target if isinstance(target, GatedEnd) else GatedEnd(target, adapter_name, place)
            layer.update_layer(adapter_name, config, path)
        else:
            layer = target if isinstance(target, AttentionEnd) else AttentionEnd(target, adapter_name, place)
            layer.update_layer(adapter_name)
        return layer

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        names = kwargs.get("adapter_names") or self.active_adapters
        ends = [m for m in self.model.modules() if isinstance(m, GatedEnd)]
        if merge and (gated := [n for n in names if any(n in m.aurora_gates for m in ends)]):
            raise BadInput(
                f"adapter {gated[0]!r} has gates, which are no weight: a model without the adapter cannot hold them. "
                "Keep the adapter (merge_adapter leaves the gates at work), or train with gates: false."
            )
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


class Aurora(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = AuroraOptions
    Config = AuroraConfig
    Tuner = AuroraModel

    @classmethod
    def check(cls, config: AuroraConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse what cannot work on these sites; no condition is needed.

        Raises:
            BadInput: no such tower, layer or map, widths that the factors cannot have, or no place for the gates.
        """
        places(config, sites)

    @classmethod
    def unmergeable(cls, config: AuroraConfig) -> str | None:
        """Gates keep working beside merged weights, but no model without the adapter can hold them."""
        return super().unmergeable(config) or AuroraModel.no_lora(config)

    @classmethod
    def decays(cls, config: AuroraConfig, name: str) -> bool:
        """All that trains decays, gates and `up` too, as published."""
        return True


def places(config: AuroraConfig, sites: Sites) -> dict[str, Place]:
    """Full path of every leaf that the config means, and what is to be done there.

    Raises:
        BadInput: as `Aurora.check`.
    """
    attention, ffn = _chosen(config, sites)
    leaves: dict[str, Place] = {}
    for site in attention:
        leaves |= dict(_attention(config, site))
    for site in ffn:
        leaves |= dict(_feed_forward(config, site))
    if not leaves:
        raise BadInput(
            f"image_targets, text_targets: nothing to adapt in {_named(sites)}. Name maps for a tower that is there."
        )
    gates = {} if config.gates is False else dict(_gates(attention, ffn))
    if config.gates and not gates:
        raise BadInput(
            "gates: no chosen text layer has cross-attention and a LayerNorm at its end. Set gates: false, or choose "
            "other towers or layers."
        )
    return leaves | gates


def _chosen(config: AuroraConfig, sites: Sites) -> tuple[list[AttentionSite], list[FFNSite]]:
    """Sites of the towers and layers that the config names."""
    if not sites.towers:
        raise no_known_family("towers")
    for wanted in config.towers or []:
        if wanted not in sites.towers and wanted not in sites.towers.values():
            raise BadInput(f"towers: no tower {wanted!r}. Known: {_named(sites)}.")

    def meant(site: AttentionSite | FFNSite) -> bool:
        tower = config.towers is None or site.tower in config.towers or site.modality in config.towers
        return tower and (config.layers is None or site.layer in config.layers)

    if config.layers is not None:
        have = {s.layer for s in sites.attention}
        if missing := sorted(set(config.layers) - have):
            raise BadInput(f"layers: {missing} are in no tower; the layers are 0 to {max(have)}.")
    attention, ffn = [s for s in sites.attention if meant(s)], [s for s in sites.ffn if meant(s)]
    if not attention:
        raise BadInput(f"towers, layers: {config.towers}, {config.layers} leave no layer of {_named(sites)}.")
    return attention, ffn


def _attention(config: AuroraConfig, site: AttentionSite) -> Iterator[tuple[str, LinearPlace]]:
    text = site.modality == "text"
    targets = config.text_targets if text else config.image_targets
    leaves: dict[str, list[tuple[str, Projection]]] = {}
    for name in ("q", "k", "v", "out"):
        if name in targets:
            projection = getattr(site, name)
            leaves.setdefault(projection.path, []).append((name, projection))
    for path, named in leaves.items():
        projections = sorted((p for _, p in named), key=lambda p: p.start)
        if len({p.width for p in projections}) > 1:
            raise BadInput(
                f"{path}: holds maps of different widths in one, which cannot share one `up`. Leave some of them "
                f"out of {'text' if text else 'image'}_targets."
            )
        names = [name for name, _ in named]
        yield (
            path,
            LinearPlace(
                role="attention",
                parts=tuple((p.start, p.width) for p in projections),
                widths=(projections[0].in_width, projections[0].width),
                chunks=1,
                columns=1 if text else 4,
                scaled=not text and names == ["out"],
                text=text,
                cross_key=site.cross and "k" in names,
            ),
        )


def _feed_forward(config: AuroraConfig, site: FFNSite) -> Iterator[tuple[str, LinearPlace]]:
    text = site.modality == "text"
    key = "text_targets" if text else "image_targets"
    for name, projection, role in (("fc1", site.up, "widen"), ("fc2", site.down, "narrow")):
        if name not in getattr(config, key):
            continue
        width, hidden = site.up.in_width, site.up.width
        if site.gate is not None or hidden % width or site.down.width != width:
            what = "a gated block" if site.gate is not None else f"{width} wide with {hidden} inside"
            raise BadInput(
                f"{projection.path}: the feed-forward layer is {what}; fc1 and fc2 need a plain block whose inner "
                f"width is a multiple of the outer one. Leave them out of {key}."
            )
        chunks = hidden // width
        out = hidden if role == "widen" else width
        yield (
            projection.path,
            LinearPlace(
                role=role,
                parts=((0, out),),
                widths=(width, width),
                chunks=chunks,
                columns=1 if text else 2 * chunks,
                scaled=not text,
                text=text,
            ),
        )


def _gates(attention: list[AttentionSite], ffn: list[FFNSite]) -> Iterator[tuple[str, NormPlace]]:
    """Three norms of every post-norm text layer with cross-attention."""
    for end in ffn:
        sublayers = {s.cross: s for s in attention if s.block == end.block}
        norms = [s.norm for s in (*sublayers.values(), end) if not s.pre_norm]
        if end.modality != "text" or len(norms) != 3 or None in norms:
            continue
        captured, width = Captured(), end.down.width
        yield sublayers[False].norm, NormPlace("self", captured, width)
        yield sublayers[True].norm, NormPlace("cross", captured, width)
        yield end.norm, NormPlace("end", captured, width)


def _named(sites: Sites) -> str:
    return ", ".join(f"{path!r} ({kind})" for path, kind in sites.towers.items())


ENTRY = Aurora
