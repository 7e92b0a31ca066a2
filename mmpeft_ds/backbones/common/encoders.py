"""Dual encoders as encoders of images and texts, for `backbones/clip` and `backbones/dual_encoder`."""

# I images, T texts, n plain texts, D width of the features

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.batch import PackedBatch, changes_of

log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 256


class EncoderPair(BackboneBase):
    """Base of backbones whose model returns a `DualEncoderOutput`."""

    embeds = True

    def embed(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Features (I, D) and (T, D) after the projections, not normalised; None for what the batch lacks."""
        out = model(**self.inputs(batch), unit=False)
        return out.image_features, out.text_features

    @torch.no_grad()
    def embed_texts(self, model: nn.Module, texts: list[str]) -> Tensor:
        """Features (n, D) of plain texts, not normalised, on the device of the model."""
        device = next(model.parameters()).device
        rows = [torch.zeros(0, self.feature_widths[1], device=device)]
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tokens = self.collate_texts(texts[start : start + TEXTS_AT_ONCE])
            if cut := int((changes_of(tokens, len(tokens))[:, 0] > 0).sum()):
                log.warning("%d texts are longer than backbone.%s, and lack their end", cut, self.prompt_limit)
            rows.append(model(**{name: ids.to(device) for name, ids in tokens.items()}, unit=False).text_features)
        return torch.cat(rows)
