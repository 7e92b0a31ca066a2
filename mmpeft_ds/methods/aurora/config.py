"""The peft config of Aurora."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft_ds.methods.aurora.options import AuroraOptions
from mmpeft_ds.methods.common.config import MethodConfig


@dataclass
class AuroraConfig(AuroraOptions, MethodConfig):
    """AuroraOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "AURORA"
