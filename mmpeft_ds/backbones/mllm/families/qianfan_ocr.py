"""Qianfan-OCR: the template writes another token for an image than the one that stands for its features."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.backbones.mllm.families.base import Family


class QianfanOCR(Family):
    """Two tokens for images."""

    model_types = ("qianfan_ocr",)
    unpackable = ""

    def mark(self, processor: Any) -> str:
        return processor.image_placeholder_token


ENTRY = QianfanOCR()
