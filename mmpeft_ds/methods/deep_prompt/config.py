"""The peft config of deep prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.deep_prompt.options import DeepPromptOptions


@dataclass
class DeepPromptConfig(DeepPromptOptions, MethodConfig):
    """DeepPromptOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "DEEP_PROMPT"
