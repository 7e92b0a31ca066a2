"""MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: images in slices, in one strip of patches, and numbered in a text."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mmpeft_ds.backbones.mllm.families.base import Family

_NUMBER = re.compile(r"(?<=>)0(?=</)")  # <image_id>0</image_id>, in front of the slices


class MiniCPM(Family):
    """Numbered images in slices."""

    model_types = ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
    unpackable = ""
    carrying = ("Qwen3_5GatedDeltaNet",)
    sizes_of_runs = ("target_sizes", "target_sizes_videos")

    def collate(self, pixels: list[Tensor]) -> Tensor:
        """Pixels are (1, channels, side of a patch, that of all patches together), all else has a row for a slice."""
        return torch.cat(pixels, -1) if pixels[0].dim() == 4 else super().collate(pixels)

    def numbered(self, spelling: str, number: int) -> str:
        return _NUMBER.sub(str(number), spelling, count=1)


ENTRY = MiniCPM()
