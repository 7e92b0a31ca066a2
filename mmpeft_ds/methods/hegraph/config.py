"""The peft config of HeGraphAdapter."""

from __future__ import annotations

from dataclasses import dataclass

from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.hegraph.options import HeGraphOptions


@dataclass
class HeGraphConfig(HeGraphOptions, HeadConfig):
    """HeGraphOptions as a peft config."""
