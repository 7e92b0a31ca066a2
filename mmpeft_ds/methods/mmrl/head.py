"""The head of MMRL: tokens of a shared space enter the upper layers of both encoders, and their outputs give an image
a second feature (Guo and Gu, CVPR 2025, arXiv 2503.08497).

Both towers run in every step. The image tower runs a second time, frozen and without gradient; the regularisation
keeps the features close to those of the frozen towers.
"""

# B rows, C classes, L tokens of a text, Dv width of the image tower

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.few_shot import cosine_logits
from mmpeft_ds.methods.common.text_head import TextTowerHead
from mmpeft_ds.methods.mmrl.layer import REPRESENTATION, Space, reading_classes
from mmpeft_ds.methods.mmrl.options import MMRLOptions
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.ops.representation_tokens import decoupled_logits, frozen_distance
from mmpeft_ds.sites.feature_site import Features, Scores

LIVE = "the tokens enter the image encoder in every step, so stored features cannot be used"


@dataclass
class MMRLConfig(MMRLOptions, HeadConfig):
    """MMRLOptions as a peft config."""


@dataclass(frozen=True)
class Classes:
    """Classes and encoder of a head.

    Attributes:
        tokens: of the class texts; each tensor (C, L).
        trained_classes: indices of the base classes; None: all classes.
        width: Dv.
    """

    encoder: nn.Module
    tokens: dict[str, Tensor]
    trained_classes: list[int] | None
    width: int


class MMRLHead(TextTowerHead):
    """logits = alpha tau u(z) u(t)^T + (1 - alpha) tau u(P r) u(t)^T for classes of the training data, the first of
    both for others; z the class feature of an image, r the mean of its representation tokens, t the text features.

    Attributes:
        trained_classes: (C,) 1 for a class that occurred in training; travels with the adapter.
    """

    calibrated = found_anew = ("trained_classes",)
    follows_training = True

    def __init__(self, config: MMRLConfig, base: nn.Module, place: Classes, adapter: str):
        super().__init__(config, base, place.encoder, place.tokens)
        self.adapter = adapter
        like = next(place.encoder.parameters())
        dtype, features = full_dtype(like.dtype), base.image_width
        self.space = Space(config.tokens, config.width, config.init_std, like)
        self.projection = nn.Linear(place.width, features, bias=False, dtype=dtype)
        nn.init.normal_(self.projection.weight, std=place.width**-0.5)
        self.projection.to(like.device)
        trained = torch.ones(self.bank.num_classes)
        if place.trained_classes is not None:
            trained = torch.zeros_like(trained).index_fill(0, torch.tensor(place.trained_classes), 1.0)
        self.register_buffer("trained_classes", trained.to(like.device))
        self._frozen_text: Tensor | None = None

    @property
    def reads_frozen_images(self) -> bool:
        return self.training and self.config.regularisation > 0

    def inserting(self) -> contextlib.AbstractContextManager[None]:
        return reading_classes(self.adapter)

    def forward(self, features: Features) -> Scores:
        """Raises BadInput where the images have not gone through the encoder in this forward."""
        if features.further is None or REPRESENTATION not in features.further:
            raise BadInput(f"mmrl: {LIVE}. Set backbone.images: live, or pass `batch` to the model.")
        frozen = self._text_as_frozen() if self.reads_frozen_images else None
        image, text = features.image, self.text
        representation = self.projection(features.further[REPRESENTATION].to(self.projection.weight.dtype))
        of_class = cosine_logits(image, text, self.logit_scale)
        of_tokens = cosine_logits(representation, text, self.logit_scale)
        alpha = self.config.alpha
        penalty = None
        if frozen is not None:
            # not by an index of the trained classes, for whose number the host would wait
            share = self.trained_classes.to(text.dtype) / self.trained_classes.sum()
            of_texts = (frozen_distance(text, frozen) * share).sum()
            of_images = frozen_distance(image, features.further["frozen"]).to(text.dtype)
            penalty = self.config.regularisation * (of_images + of_texts)
        return Scores(
            decoupled_logits(of_class, of_tokens, self.trained_classes, alpha),
            [(alpha, of_class), (1 - alpha, of_tokens)],
            penalty=penalty,
        )

    @torch.no_grad()
    def _text_as_frozen(self) -> Tensor:
        """(C, D) class features of the frozen tower, computed once."""
        known = self._frozen_text
        if known is None or known.device != self.trained_classes.device:
            self._frozen_text = known = self._as_frozen()
        return known
