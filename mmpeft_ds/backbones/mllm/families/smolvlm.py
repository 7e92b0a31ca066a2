"""SmolVLM: its processor asks for a package that it needs to write the number of frames of a video in words alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

from transformers.models.smolvlm import processing_smolvlm

from mmpeft_ds.backbones.mllm.families.base import Family

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


class SmolVLMProcessor(processing_smolvlm.SmolVLMProcessor):
    """The stock one without the package num2words."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        image_seq_len: int = 169,
        chat_template: str | None = None,
    ):
        with mock.patch.object(processing_smolvlm, "num2words", in_words):
            super().__init__(image_processor, tokenizer, video_processor, image_seq_len, chat_template)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """The stock spelling."""
        with mock.patch.object(processing_smolvlm, "num2words", in_words):
            return super().replace_video_token(video_inputs, video_idx, **kwargs)


def in_words(number: int) -> str:
    """An English numeral below ten thousand, as the package num2words has it."""
    ones, tens = _BELOW_TWENTY.split(), _TENS.split()
    if number < 20:
        return ones[number]
    if number < 100:
        return tens[number // 10 - 2] + (f"-{ones[number % 10]}" if number % 10 else "")
    unit, name, between = (100, "hundred", " and ") if number < 1000 else (1000, "thousand", ", ")
    rest = number % unit
    between = " and " if rest < 100 else between
    return f"{in_words(number // unit)} {name}" + (between + in_words(rest) if rest else "")


class SmolVLM(Family):
    """Videos as images with their times."""

    model_types = ("smolvlm",)
    processor = SmolVLMProcessor
    unpackable = ""


ENTRY = SmolVLM()
