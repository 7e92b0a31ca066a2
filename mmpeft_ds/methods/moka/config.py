"""The peft config of MokA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.moka.options import MokaOptions


@dataclass
class MokaConfig(MokaOptions, MethodConfig):
    """MokaOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "MOKA"
