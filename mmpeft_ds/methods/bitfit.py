"""BitFit: the biases alone train (Ben Zaken et al., ACL 2022, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import SiteConfig
from mmpeft_ds.methods.common.layers import TrainedBias
from mmpeft_ds.methods.common.select import biases_like, inside, select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.sites import Sites, find_sites


@dataclass
class BitFitConfig(SiteConfig):
    """Copies of biases, held by the adapter and trained; the frozen ones stay what they are."""

    PEFT_TYPE: ClassVar[str] = "BITFIT"

    biases: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell-style patterns of full module paths, such as [*.query, *.value], anywhere in the model; "
            "default every Linear, Conv1D and norm with a bias in the chosen layers of the tower."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.biases is not None and (self.layers is not None or self.tower is not None):
            raise BadInput("biases: patterns choose from the whole model. Leave out tower and layers.")


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


class BitFit:
    """The method entry: what recipes and the engine use."""

    peft_type = BitFitConfig.PEFT_TYPE
    Config = BitFitConfig
    Tuner = BitFitModel
    prefix = BitFitModel.prefix
    mergeable = True

    @staticmethod
    def check(config: BitFitConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower or layer."""
        if config.biases is None:
            select(sites, config.tower, config.layers)

    @staticmethod
    def prepare(config: BitFitConfig, model: nn.Module, sites: Sites) -> BitFitConfig:
        """The config as it is: the tuner finds its places by itself."""
        return config

    @staticmethod
    def kinds(names: list[str]) -> dict[str, list[str]]:
        """Parameter names by what they are: `bias` or `head`."""
        found: dict[str, list[str]] = {"peft": [], "norm": [], "bias": [], "head": []}
        for name in names:
            found["bias" if ".bitfit_bias." in name else "head"].append(name)
        return found


ENTRY = BitFit
