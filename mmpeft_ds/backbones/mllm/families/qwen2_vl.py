"""Qwen2-VL and Qwen2.5-VL: images of any size in patches, which stand flat, channels first."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class Qwen2VL(Family):
    """Images in flat patches."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    spelled = False
    channels = 1
    unpackable = ""


ENTRY = Qwen2VL()
