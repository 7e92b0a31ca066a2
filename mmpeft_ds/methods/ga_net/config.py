"""The peft config of GA-Net."""

from __future__ import annotations

from dataclasses import dataclass

from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.ga_net.options import GaNetOptions


@dataclass
class GaNetConfig(GaNetOptions, HeadConfig):
    """GaNetOptions as a peft config."""
