"""Families whose language model has layers that carry something from token to token beside those with attention."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class Hybrid(Family):
    """Gated delta rule (Qwen3.5, GLM-5) or short convolutions (LFM2, LFM3) in every other layer."""

    model_types = ("glm5_next", "lfm2_vl", "lfm3_vl", "qwen3_5", "qwen3_5_moe")
    unpackable = ""
    patches = ("glm5_next", "lfm3_vl", "qwen3_5", "qwen3_5_moe")
    carrying = (
        "Glm5NextTextAttention",  # which looks for keys in pools of tokens beside each other
        "Glm5NextTextLinearAttention",
        "Lfm2ShortConv",
        "Lfm3ShortConv",
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5MoeGatedDeltaNet",
    )


ENTRY = Hybrid()
