"""Options of the backbone `mllm`: a checkpoint, the conversation's template and length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.backbones.common.options import BackboneOptions
from mmpeft_ds.fitting import ByOption


@dataclass
class Options(BackboneOptions):
    """Keys of the recipe's `backbone` section.

    Attributes:
        model: hub name or local directory of an image-text-to-text model; docs/backbones.md lists the families.
        random_weights: take only its configuration, tokenizer and image processor; for tests and measurements.
        max_text_length: tokens of a conversation, a run of image tokens counted as one. A longer one loses its oldest
            turns, then the middle of its last question, then the end of the answer; never an image or the header of
            the answer.
        max_pixels: of models that take images of any size in patches (Qwen's, GLM's and others): larger images are
            scaled down to this many pixels, 0 = as the checkpoint says. Qwen2-VL makes a token of 28 x 28 pixels,
            Qwen3-VL of 32 x 32.
        system: text of a first system turn for conversations that have none; empty: no such turn.
        chat_template: Jinja file of the chat template, where the checkpoint has none or its own is to be replaced.
        condition: what adapters of the language model route on: `none`, the `pooled` vector (mean of an image's tokens
            behind the projector, mean over the images of a sample), or all these `tokens`.
    """

    gives: ClassVar[ByOption] = {"": ("generated text", "conversation scores")}

    model: str = "llava-hf/llava-1.5-7b-hf"
    random_weights: bool = False
    max_text_length: int = 1024
    max_pixels: int = 0
    system: str = ""
    chat_template: str = ""
    condition: Literal["none", "pooled", "tokens"] = "none"
