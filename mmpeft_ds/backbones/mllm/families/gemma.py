"""Gemma 3 and 4: the tokens of an image see each other, in Gemma 4 where its configuration says so."""

from __future__ import annotations

from transformers import PretrainedConfig

from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.finishing import capped


class Gemma(Family):
    """Images that are seen from both sides."""

    model_types = ("gemma3", "gemma4")
    unpackable = ""
    finishes = {"gemma4": capped}

    def unreadable(self, config: PretrainedConfig) -> str:
        if getattr(config.vision_config, "pooling_kernel_size", 0) != 1:
            return ""
        return "with pooling_kernel_size 1 transformers 5.23 takes the padding of an image for its patches"

    def looks_ahead(self, config: PretrainedConfig) -> bool:
        return config.model_type == "gemma3" or config.get_text_config().use_bidirectional_attention == "vision"


ENTRY = Gemma()
