"""HunYuan-VL: its processor takes an image only between the tokens that begin and end one."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.backbones.mllm.families.base import Family


class HunYuanVL(Family):
    """Images between two tokens."""

    model_types = ("hunyuan_vl",)
    unpackable = "has positions that depend on which other images are in the batch (transformers 5.23)"

    def alone(self, processor: Any) -> str:
        return processor.image_start_token + processor.image_token + processor.image_end_token


ENTRY = HunYuanVL()
