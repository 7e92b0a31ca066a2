"""Options of the backbone `mllm`: a checkpoint, the conversation's template and length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmpeft_ds.backbones.common.options import BackboneOptions, Quantise
from mmpeft_ds.fitting import ByOption

ImageBackend = Literal["torchvision", "pil"]


@dataclass
class Options(BackboneOptions):
    """Keys of the recipe's `backbone` section.

    Attributes:
        model: hub name or local directory of an image-text-to-text model; docs/backbones.md lists the families.
        random_weights: take only its configuration, tokenizer and image processor; for tests and measurements.
        quantise: weights of the frozen linear layers in blocks of all towers: `nf4` (bitsandbytes), `int8` or `fp8`
            (torchao); `none`: as engine.dtype says. Below ZeRO stage 3; docs/quantised.md.
        max_text_length: tokens of a conversation, a run of image tokens counted as one. A longer one loses its oldest
            turns, then the middle of its last question, then the end of the answer; never an image or the header of
            the answer.
        max_pixels: of models that take images of any size in patches (Qwen's, GLM's and others): larger images,
            and frames of videos, are scaled down to this many pixels, 0 = as the checkpoint says. Qwen2-VL makes a
            token of 28 x 28 pixels, Qwen3-VL of 32 x 32; of two frames at once.
        image_backend: the library that scales images, as transformers names it: `torchvision`, whose arithmetic on
            tensors is used whether or not it is installed, or `pil`, three to four times slower. The pixels of both
            differ by rounding.
        system: text of a first system turn for conversations that have none; empty: no such turn.
        chat_template: Jinja file of the chat template, where the checkpoint has none or its own is to be replaced.
        thinking: answers of the data hold thoughts, as the template takes them (`<think>...</think>` before the rest),
            and begin where the template asks for such ones (`enable_thinking`). false: where it asks for answers
            without thoughts; in training, evaluation and prediction alike.
        videos: `videos` as the family has them, with their times; `images`: each frame is an image, without its time,
            which any family reads.
        condition: what adapters of the language model route on: `none`, the `pooled` vector (mean of an image's tokens
            after the projector, mean over the images of a sample), or all these `tokens`.
    """

    gives: ClassVar[ByOption] = {"": ("generated text", "conversation scores")}
    former: ClassVar[dict[str, Any]] = {"image_backend": "pil"}

    model: str = "llava-hf/llava-1.5-7b-hf"
    random_weights: bool = False
    quantise: Quantise = "none"
    max_text_length: int = 1024
    max_pixels: int = 0
    image_backend: ImageBackend = "torchvision"
    system: str = ""
    chat_template: str = ""
    thinking: bool = False
    videos: Literal["videos", "images"] = "videos"
    condition: Literal["none", "pooled", "tokens"] = "none"
