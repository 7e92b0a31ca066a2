"""The peft config of routed LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft_ds.methods.common.routed import RoutedConfig
from mmpeft_ds.methods.routed_lora.options import RoutedLoraOptions


@dataclass
class RoutedLoraConfig(RoutedLoraOptions, RoutedConfig):
    """RoutedLoraOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "ROUTED_LORA"
