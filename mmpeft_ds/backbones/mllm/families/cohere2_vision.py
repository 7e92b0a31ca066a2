"""Command A Vision: what its image processor calls a patch are the tokens of a side of a tile, not pixels."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class Cohere2Vision(Family):
    """Images in tiles."""

    model_types = ("cohere2_vision",)
    unpackable = ""
    compared = ()


ENTRY = Cohere2Vision()
