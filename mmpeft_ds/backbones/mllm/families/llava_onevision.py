"""LLaVA-OneVision: the features of a video end with one that says so, after those of all its frames."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft_ds.backbones.mllm.families.base import Family


class LlavaOnevision(Family):
    """Videos with an end."""

    model_types = ("llava_onevision",)
    unpackable = ""

    def without_padding(self, features: Tensor, wanted: int) -> Tensor:
        return torch.cat([features[: wanted - 1], features[-1:]])


ENTRY = LlavaOnevision()
