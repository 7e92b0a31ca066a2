"""Cosmos 3 Edge: its processor replaces a video together with the tokens around it."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.backbones.mllm.families.base import Family


class Cosmos3Edge(Family):
    """Videos with what encloses them."""

    model_types = ("cosmos3_edge",)
    unpackable = ""
    patches = model_types

    def video_mark(self, processor: Any) -> str:
        return processor.vision_start_token + processor.video_token + processor.vision_end_token


ENTRY = Cosmos3Edge()
