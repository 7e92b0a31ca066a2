"""Mistral Large 4: sees as Mistral 3 does; its language model is another."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.mistral3 import Mistral3


class MistralLarge4(Mistral3):
    """Images in rows of patches."""

    model_types = ("mistral_large4",)
    by_mask = True


ENTRY = MistralLarge4()
