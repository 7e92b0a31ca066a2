"""SmolVLM: images are spelled as Idefics3's are; its own processor asks for a package that only videos need."""

from __future__ import annotations

from transformers import Idefics3Processor

from mmpeft_ds.backbones.mllm.families.base import Family


class SmolVLM(Family):
    """Images as Idefics3 has them."""

    model_types = ("smolvlm",)
    processor = Idefics3Processor


ENTRY = SmolVLM()
