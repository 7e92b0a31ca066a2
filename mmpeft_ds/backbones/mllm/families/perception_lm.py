"""PerceptionLM: images in tiles, of which each image has as many as its shape asks for; its model reads the tiles of
all images one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft_ds.backbones.mllm.families.base import Family


class PerceptionLM(Family):
    """Tiles without padding."""

    model_types = ("perception_lm",)

    def collate(self, pixels: list[Tensor]) -> Tensor:
        """Pixels are (1, tiles, channels, height, width), all else has a row for an image."""
        return torch.cat(pixels, 1) if pixels[0].dim() == 5 else super().collate(pixels)


ENTRY = PerceptionLM()
