"""The peft tuner of TensLoRA: which projections are slices of which tensor."""

from __future__ import annotations

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.select import select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.tens_lora.config import TensLoraConfig
from mmpeft_ds.methods.tens_lora.layer import Factors, Slice, Slices, TensLoraLinear
from mmpeft_ds.methods.tens_lora.options import TensLoraOptions
from mmpeft_ds.sites import AttentionSite, Projection, Sites, find_sites


class TensLoraModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `TensLoraConfig`."""

    prefix = "tens_lora"

    @classmethod
    def no_lora(cls, config: TensLoraConfig) -> None:
        """A slice of a tensor has at most the rank of the mode of inputs."""

    def places(self, config: TensLoraConfig, model: nn.Module) -> dict[str, Slices]:
        """Every adapted leaf and its slices."""
        self._shared: dict[tuple, Factors] = {}  # of the adapter that is being added
        return places(config, find_sites(model))

    def wrap(
        self, config: TensLoraConfig, adapter_name: str, target: nn.Module, place: Slices, path: str
    ) -> nn.Module:
        layer = target if isinstance(target, TensLoraLinear) else TensLoraLinear(target, adapter_name)
        layer.update_layer(adapter_name, place, config, self._shared, path)
        return layer


class TensLora(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = TensLoraOptions
    Config = TensLoraConfig
    Tuner = TensLoraModel

    @classmethod
    def check(cls, config: TensLoraConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse what cannot work on these sites; no condition is needed.

        Raises:
            BadInput: no such tower or layer, or outputs that are no whole number of heads.
        """
        places(config, sites)


def places(config: TensLoraConfig, sites: Sites) -> dict[str, Slices]:
    """Full path of every leaf that the config means, and which slices of which tensors it adds.

    One tensor spans projections of one tower whose input and output are equally wide, self-attention apart from
    cross-attention. Keys and values of grouped queries are narrower than queries, so these have a tensor of their own.

    Raises:
        BadInput: as `TensLora.check`.
    """
    chosen = select(sites, config.tower, config.layers)
    members: dict[tuple[str, ...], list[tuple[AttentionSite, str, Projection]]] = {}
    for site in chosen.attention:
        for name in ("q", "k", "v", "out"):
            if name in config.targets:
                projection = getattr(site, name)
                members.setdefault(_tensor(config, site, name, projection), []).append((site, name, projection))
    slices: dict[str, list[tuple[Projection, Slice]]] = {}
    for tensor, group in members.items():
        names = list(dict.fromkeys(name for _, name, _ in group))
        layers = sorted({site.layer for site, _, _ in group})
        for site, name, projection in group:
            index = {"projections": (len(names), names.index(name)), "layers": (len(layers), layers.index(site.layer))}
            beside = [index[mode] for mode in config.ordered_modes if mode in index]
            sizes = (*_widths(config, site, projection), *(size for size, _ in beside))
            slices.setdefault(projection.path, []).append(
                (projection, Slice(tensor, sizes, tuple(r for _, r in beside)))
            )
    return {
        path: Slices(tuple((p.start, p.width) for p, _ in pieces), tuple(piece for _, piece in pieces))
        for path, pieces in slices.items()
    }


def _tensor(config: TensLoraConfig, site: AttentionSite, name: str, projection: Projection) -> tuple[str, ...]:
    kind = "cross" if site.cross else "self"
    apart = [] if "projections" in config.modes else [name]
    apart += [] if "layers" in config.modes else [str(site.layer)]
    return (site.tower, kind, str(projection.in_width), str(projection.width), *apart)


def _widths(config: TensLoraConfig, site: AttentionSite, projection: Projection) -> tuple[int, ...]:
    """Sizes of the modes input and output, and of heads where they are a mode."""
    if "heads" not in config.modes:
        return projection.in_width, projection.width
    heads, rest = divmod(projection.width, site.head_dim)
    if rest:
        raise BadInput(
            f"modes: the {projection.width} outputs of {projection.path} are no whole number of heads of "
            f"{site.head_dim}. Leave out `heads`, or that projection from `targets`."
        )
    return projection.in_width, site.head_dim, heads


ENTRY = TensLora
