"""The peft tuner of MokA: which projections of the language model it wraps."""

from __future__ import annotations

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.options import PROJECTIONS
from mmpeft_ds.methods.common.select import select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.moka.config import MokaConfig
from mmpeft_ds.methods.moka.layer import MokaLinear, Parts
from mmpeft_ds.methods.moka.options import MokaOptions
from mmpeft_ds.sites import Projection, Sites, find_sites


class MokaModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `MokaConfig`."""

    prefix = "moka"

    @classmethod
    def unmergeable(cls, config: MokaConfig) -> str | None:
        """It is no change of one weight."""
        return "tokens of images and of text go through different `down` matrices, which no single weight can hold."

    def places(self, config: MokaConfig, model: nn.Module) -> dict[str, Parts]:
        """Every adapted leaf and its parts."""
        return places(config, find_sites(model))

    def wrap(self, config: MokaConfig, adapter_name: str, target: nn.Module, place: Parts, path: str) -> nn.Module:
        layer = target if isinstance(target, MokaLinear) else MokaLinear(target, adapter_name)
        layer.update_layer(adapter_name, place, config, path)
        return layer


class Moka(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = MokaOptions
    Config = MokaConfig
    Tuner = MokaModel

    @classmethod
    def check(cls, config: MokaConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse towers that read no images among their text, and layers that are not there. Raises BadInput."""
        places(config, sites)

    @classmethod
    def reads_kinds(cls, config: MokaConfig) -> bool:
        """That is what it is about."""
        return True


def places(config: MokaConfig, sites: Sites) -> dict[str, Parts]:
    """Full path of every leaf that the config means, and (first output feature, width) of each adapted part.

    Raises:
        BadInput: as `Moka.check`.
    """
    chosen = select(sites, config.tower, config.layers)
    if any(site.modality != "text" or site.cross or not site.causal for site in chosen.attention):
        raise BadInput(
            f"tower: {', '.join(map(repr, chosen.towers))} is no causal language model without cross-attention, and "
            "only such a one reads images and text in one sequence. Name another, or use another method."
        )
    blocks = [(site, PROJECTIONS) for site in chosen.attention] + [
        (site, ("up", "gate", "down")) for site in chosen.ffn
    ]
    of_path: dict[str, list[Projection]] = {}
    for site, names in blocks:
        for projection in (getattr(site, name) for name in names if name in config.targets):
            if projection is not None:
                of_path.setdefault(projection.path, []).append(projection)
    if not of_path:
        raise BadInput(f"targets: the chosen layers have none of {', '.join(config.targets)}.")
    return {path: tuple((p.start, p.width) for p in parts) for path, parts in of_path.items()}


ENTRY = Moka
