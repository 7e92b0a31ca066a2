"""Molmo 2: every text has a beginning that no template writes, and parts of images are pooled by their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmpeft_ds.backbones.mllm.families.base import Family

_POOLED = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}


class Molmo2(Family):
    """Pooled patches."""

    model_types = ("molmo2",)
    unpackable = ""
    one_token = True

    def opening(self, tokenizer: Any) -> str:
        return tokenizer.bos_token or tokenizer.eos_token

    def looks_ahead(self, config: PretrainedConfig) -> bool:
        return True

    def together(self, media: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Patches are numbered through all images of the batch; -1 stands for none."""
        shifted = [dict(one) for one in media]
        for name, pixels in _POOLED.items():
            if name in media[0]:
                counts = [one[pixels].shape[:2].numel() for one in media]
                for one, first in zip(shifted, itertools.accumulate(counts, initial=0), strict=False):
                    one[name] = torch.where(one[name] >= 0, one[name] + first, -1)
        return super().together(shifted)

    def token_types(self, media_tokens: Tensor, labels: Tensor | None) -> Tensor:
        """1 also for videos."""
        return (media_tokens > 0).long()


ENTRY = Molmo2()
