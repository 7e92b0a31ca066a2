"""Qwen3-VL-MoE: its experts are turned as they are read, which transformers does with whole ones alone."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class Qwen3VLMoe(Family):
    """Turned experts."""

    model_types = ("qwen3_vl_moe",)
    unpackable = ""
    loads_whole = True


ENTRY = Qwen3VLMoe()
