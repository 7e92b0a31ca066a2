"""DeepSeek-OCR 2 and Unlimited-OCR: large images are cut into parts, which small images lack."""

from __future__ import annotations

from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.backbones.mllm.families.base import Family


class DeepseekOcr(Family):
    """Images in parts."""

    model_types = ("deepseek_ocr2", "unlimited_ocr")
    unpackable = ""
    row_attention = text_attention.MASKED  # the window of Unlimited-OCR, which does not hide what was read at once
    optional = ("pixel_values_local",)
    part_side = "tile_size"
    as_lists = ("num_local_patches", "patches_grid")


ENTRY = DeepseekOcr()
