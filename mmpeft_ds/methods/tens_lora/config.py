"""The peft config of TensLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.tens_lora.options import TensLoraOptions


@dataclass
class TensLoraConfig(TensLoraOptions, MethodConfig):
    """TensLoraOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "TENS_LORA"
