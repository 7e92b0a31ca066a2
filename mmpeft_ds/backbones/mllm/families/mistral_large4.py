"""Mistral Large 4: sees as Mistral 3 does; its language model is another, whose layers choose keys with attention of
transformers' own names alone."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.mistral3 import Mistral3
from mmpeft_ds.backbones.mllm.finishing import capped


class MistralLarge4(Mistral3):
    """Images in rows of patches."""

    model_types = ("mistral_large4",)
    row_attention = ""
    finishes = {"mistral_large4": capped}


ENTRY = MistralLarge4()
