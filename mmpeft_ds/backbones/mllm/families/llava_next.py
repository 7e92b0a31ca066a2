"""LLaVA-NeXT: an image is cut into tiles, whose number depends on its shape."""

from __future__ import annotations

from torch import Tensor, nn

from mmpeft_ds.backbones.mllm.families.base import Family


class LlavaNext(Family):
    """Images in tiles."""

    model_types = ("llava_next",)
    spelled = False
    channels = 2
    packs = True

    def collate(self, pixels: list[Tensor]) -> Tensor:
        """(I, most tiles, 3, H, W); tiles that only pad the number are left out by the model."""
        return nn.utils.rnn.pad_sequence([p[0] for p in pixels], batch_first=True)


ENTRY = LlavaNext()
