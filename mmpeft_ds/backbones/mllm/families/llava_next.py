"""LLaVA-NeXT: an image is cut into tiles, whose number depends on its shape; those that pad it are left out by the
model."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class LlavaNext(Family):
    """Images in tiles."""

    model_types = ("llava_next",)
    spelled = False
    channels = 2
    unpackable = ""


ENTRY = LlavaNext()
