"""Families that are as most in everything, with packed texts too."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.finishing import divided
from mmpeft_ds.ops.finished_logits import Finish


def _scaled_and_capped(text: Any) -> Finish:
    return Finish(text.output_multiplier, text.final_logit_softcapping)


class Usual(Family):
    """Held against padded rows in `tests/backbones/test_packed_families.py`."""

    model_types = (
        "aria",
        "aya_vision",
        "cohere_compass",
        "cosmos3_omni",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "ernie4_5_vl_moe",
        "exaone4_5",
        "granite_docling",
        "hyperclovax_vision_v2",
        "idefics3",
        "internvl",
        "lighton_ocr",
        "muse_glimmer",
        "muse_spark",
        "ovis2",
        "paddleocr_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "video_llama_3",
        "vipllava",
    )
    unpackable = ""
    patches = (
        "cohere_compass",
        "cosmos3_omni",
        "ernie4_5_vl_moe",
        "exaone4_5",
        "hyperclovax_vision_v2",
        "paddleocr_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "video_llama_3",
    )
    finishes = {
        "cohere_compass": lambda text: Finish(1.0 if text.logit_scale is None else text.logit_scale),
        "granite_docling": divided,
        "hyperclovax_vision_v2": lambda text: Finish(text.logits_scaling),
        "muse_glimmer": _scaled_and_capped,
        "muse_spark": _scaled_and_capped,
    }


ENTRY = Usual()
