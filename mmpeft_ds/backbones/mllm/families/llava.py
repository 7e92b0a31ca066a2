"""LLaVA-1.5: every image has one size, and becomes as many tokens as the tower has patches."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.backbones.mllm.families.base import Family


class Llava(Family):
    """Images of one size."""

    model_types = ("llava",)
    spelled = False
    channels = 1
    unpackable = ""

    def min_side(self, processor: Any) -> int | None:
        return processor.size.get("shortest_edge") or processor.size.get("height")


ENTRY = Llava()
