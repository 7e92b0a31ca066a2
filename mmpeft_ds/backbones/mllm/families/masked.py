"""Families whose texts need the mask that the model makes of a row: layers that choose keys by it, or images that are
seen from both sides."""

from __future__ import annotations

from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.finishing import capped


class Masked(Family):
    """Each text takes its part of the mask."""

    model_types = ("gemma4_unified", "qwen4_exp")
    unpackable = ""
    patches = ("qwen4_exp",)
    finishes = {"gemma4_unified": capped}
    row_attention = text_attention.MASKED
    carrying = ("Qwen4ExpTextGatedDeltaNet", "Qwen4ExpTextPLELayer")


ENTRY = Masked()
