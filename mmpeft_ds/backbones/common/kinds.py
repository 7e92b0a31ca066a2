"""Kinds of the tokens of a language model that reads images in its sequence, as its condition publishes them."""

# T texts, L positions

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft_ds.sites.condition import MEDIA, OTHER, PROMPT, QUESTION


def kinds_of(keep: Tensor, media: Tensor, labels: Tensor | None) -> Tensor:
    """`Condition.kinds` of texts.

    Args:
        keep, media: (T, L) bool, what holds a token, and what holds one of an image or a video.
        labels: (T, L), -100 = no label. The positions before the first label are the prompt; None: all positions are.
    """
    prompt = keep if labels is None else keep & ((labels != -100).cumsum(1) == 0)
    before = (media & prompt).flip(1).cumsum(1).flip(1) > 0  # something of an image is still to come
    kinds = (
        torch.full(keep.shape, OTHER, device=keep.device)
        .masked_fill(prompt, QUESTION)
        .masked_fill(prompt & before, PROMPT)
    )
    return kinds.masked_fill(media, MEDIA)
