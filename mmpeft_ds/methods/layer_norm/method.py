"""LayerNorm tuning: the norms alone train (Zhao et al., ICLR 2024, arXiv 2312.11420).

peft's own LN tuning keeps float32 copies, which a bfloat16 model cannot call; ours casts at the edge and takes the
norms from the sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.common.layers import TrainedNorm
from mmpeft_ds.methods.common.select import norms_like, select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.layer_norm.options import LayerNormOptions
from mmpeft_ds.sites import Sites, find_sites


@dataclass
class LayerNormConfig(LayerNormOptions, MethodConfig):
    """LayerNormOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "LAYER_NORM"


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


class LayerNorm(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = LayerNormOptions
    Config = LayerNormConfig
    Tuner = LayerNormModel

    @classmethod
    def check(cls, config: LayerNormConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower or layer."""
        if config.norms is None:
            select(sites, config.tower, config.layers)


ENTRY = LayerNorm
