"""The peft config of p-Adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.p_adapter.options import PAdapterOptions


@dataclass
class PAdapterConfig(PAdapterOptions, MethodConfig):
    """PAdapterOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "P_ADAPTER"
