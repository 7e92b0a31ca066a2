"""MiniMax-M3: its video processor takes frames whose sides are whole numbers of patches already."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class MiniMaxM3(Family):
    """Images of any size, frames of some."""

    model_types = ("minimax_m3_vl",)
    unpackable = ""
    patches = model_types
    no_videos = "the video processor of MiniMax-M3 does not scale frames (`do_resize` false in transformers 5.23)"


ENTRY = MiniMaxM3()
