"""LayerNorm tuning: the norms alone train (Zhao et al., ICLR 2024, arXiv 2312.11420).

peft's own LN tuning keeps float32 copies, which a bfloat16 model cannot call; ours casts at the edge and takes the
norms from the sites.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import SiteConfig
from mmpeft_ds.methods.common.layers import TrainedNorm
from mmpeft_ds.methods.common.select import norms_like, select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.sites import Sites, find_sites


@dataclass
class LayerNormConfig(SiteConfig):
    """Copies of norms, held by the adapter and trained; the frozen ones stay what they are."""

    PEFT_TYPE: ClassVar[str] = "LAYER_NORM"

    norms: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell-style patterns of full module paths, such as [*.ln_1], anywhere in the model; default the "
            "norms of the chosen layers of the tower."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norms is not None and (self.layers is not None or self.tower is not None):
            raise BadInput("norms: patterns choose from the whole model. Leave out tower and layers.")


class LayerNormModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; merging writes the trained norms over the frozen ones."""

    prefix = "norm_tuning"

    def places(self, config: LayerNormConfig, model: nn.Module) -> dict[str, None]:
        if config.norms is not None:
            return dict.fromkeys(norms_like(model, config.norms, "norms"))
        return dict.fromkeys(select(find_sites(model), config.tower, config.layers).norms())

    def wrap(self, config: LayerNormConfig, adapter_name: str, target: nn.Module, place: None, path: str) -> nn.Module:
        layer = target if isinstance(target, TrainedNorm) else TrainedNorm(target, adapter_name, self.prefix)
        layer.update_layer(adapter_name, config)
        return layer


class LayerNorm:
    """The method entry: what recipes and the engine use."""

    peft_type = LayerNormConfig.PEFT_TYPE
    Config = LayerNormConfig
    Tuner = LayerNormModel
    prefix = LayerNormModel.prefix
    mergeable = True

    @staticmethod
    def check(config: LayerNormConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower or layer."""
        if config.norms is None:
            select(sites, config.tower, config.layers)

    @staticmethod
    def prepare(config: LayerNormConfig, model: nn.Module, sites: Sites) -> LayerNormConfig:
        """The config as it is: the tuner finds its places by itself."""
        return config

    @staticmethod
    def kinds(names: list[str]) -> dict[str, list[str]]:
        """Parameter names by what they are: `norm` or `head`."""
        found: dict[str, list[str]] = {"peft": [], "norm": [], "bias": [], "head": []}
        for name in names:
            found["norm" if ".norm_tuning_norm." in name else "head"].append(name)
        return found


ENTRY = LayerNorm
