"""Families that tell texts of one row apart by a mask alone: SAM and layers that choose what they attend to know no
lengths of texts, and images that are seen from both sides need a mask."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class ByMask(Family):
    """Texts of one row behind a mask."""

    model_types = ("deepseek_vl_hybrid", "gemma4_unified", "glm5_next", "inkling2", "qwen4_exp")
    unpackable = ""
    by_mask = True
    carrying = (
        "Glm5NextTextAttention",  # which looks for keys in pools of tokens beside each other
        "Glm5NextTextLinearAttention",
        "Qwen4ExpTextGatedDeltaNet",
        "Qwen4ExpTextPLELayer",
        "Inkling2ShortConvolution",
        "Inkling2DynamicShortConvolution",
    )


ENTRY = ByMask()
