"""GA-Net: a graph over the samples of the global batch (arXiv 2408.00290)."""

from mmpeft_ds.methods.ga_net.config import GaNetConfig
from mmpeft_ds.methods.ga_net.head import GaNetHead
from mmpeft_ds.methods.ga_net.model import ENTRY, GaNet, GaNetModel

__all__ = ["ENTRY", "GaNet", "GaNetConfig", "GaNetHead", "GaNetModel"]
