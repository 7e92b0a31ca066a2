"""Kimi K2.5: of its videos transformers joins pieces of equally many frames alone."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class KimiK25(Family):
    """Images of any size."""

    model_types = ("kimi_k25",)
    unpackable = ""
    patches = model_types
    no_videos = "transformers 5.23 reads pieces of equally many frames alone of its videos"


ENTRY = KimiK25()
