"""Inkling 2: its layers know eager attention alone, so that a mask tells texts of one row apart, and its convolutions
carry something from token to token."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.ops.finished_logits import Finish


class Inkling2(Family):
    """Texts of one row behind a mask."""

    model_types = ("inkling2",)
    unpackable = ""
    row_attention = ""
    finishes = {"inkling2": lambda text: Finish(cap=text.final_logit_softcapping, tokens=text.unpadded_vocab_size)}
    carrying = ("Inkling2ShortConvolution", "Inkling2DynamicShortConvolution")


ENTRY = Inkling2()
