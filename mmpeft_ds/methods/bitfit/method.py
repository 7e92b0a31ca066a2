"""BitFit: the biases alone train (Ben Zaken et al., ACL 2022, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.bitfit.options import BitFitOptions
from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.common.layers import TrainedBias
from mmpeft_ds.methods.common.select import biases_like, inside, select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.sites import Sites, find_sites


@dataclass
class BitFitConfig(BitFitOptions, MethodConfig):
    """BitFitOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "BITFIT"


class BitFitModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; merging writes the trained biases over the frozen ones."""

    prefix = "bitfit"

    def places(self, config: BitFitConfig, model: nn.Module) -> dict[str, None]:
        if config.biases is not None:
            paths = biases_like(model, config.biases, "biases")
        else:
            chosen = select(find_sites(model), config.tower, config.layers)
            blocks = {site.block for site in (*chosen.attention, *chosen.ffn)}
            paths = [path for path in biases_like(model, None) if inside(path, blocks)]
            if not paths:
                raise BadInput(f"biases: the layers of tower {chosen.towers} have none. Choose another method.")
        return dict.fromkeys(paths)

    def wrap(self, config: BitFitConfig, adapter_name: str, target: nn.Module, place: None, path: str) -> nn.Module:
        layer = target if isinstance(target, TrainedBias) else TrainedBias(target, adapter_name, self.prefix)
        layer.update_layer(adapter_name, config)
        return layer


class BitFit(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = BitFitOptions
    Config = BitFitConfig
    Tuner = BitFitModel

    @classmethod
    def check(cls, config: BitFitConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower or layer."""
        if config.biases is None:
            select(sites, config.tower, config.layers)


ENTRY = BitFit
