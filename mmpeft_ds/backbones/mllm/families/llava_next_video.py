"""LLaVA-NeXT-Video: its model reads the features of videos as a list."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class LlavaNextVideo(Family):
    """Images in tiles, videos in a list."""

    model_types = ("llava_next_video",)
    unpackable = ""
    video_list = True


ENTRY = LlavaNextVideo()
