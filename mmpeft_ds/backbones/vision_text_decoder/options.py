"""Options of the backbone `vision_text_decoder`: two towers, how they are joined, and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.backbones.common.vision_options import VisionOptions
from mmpeft_ds.fitting import ByOption


@dataclass
class Options(VisionOptions):
    """Keys of the recipe's `backbone` section, in addition to those of `VisionOptions`.

    Attributes:
        text: hub name, local directory or packaged:NAME of a gpt2, llama, mistral or qwen2 language model.
        projection: what carries image vectors to the width of the language model, trained in full with the method:
            `none` for towers of equal width, `linear`, or `mlp` (LayerNorm, Linear, GELU, Linear).
        begin_token: put the begin-of-text token of the language model before the image vectors. Language models of the
            llama kind draw most attention to their first position whatever stands there; an image vector there is
            hard to read. Published models of this backbone have none.
        max_text_length: tokens of start, prompt and target together, without the prefix. Where they are longer, the
            prompt loses its middle, and a target longer than half of the room its end.
        start: text before every prompt; `auto` is none after an image prefix and the published "<s>" without one.
        loss: which tokens enter the loss. `fixed`: those of the target and one end of text, but no padding.
            `official`: as published, every position up to `max_text_length`, padding with the end of text included,
            but never the first token, and never token 0 ("!" in GPT-2).
    """

    gives: ClassVar[ByOption] = {"": ("generated text",)}

    text: str = "gpt2"
    projection: Literal["none", "linear", "mlp"] = "none"
    begin_token: bool = False
    max_text_length: int = 50
    start: str = "auto"
    loss: Literal["fixed", "official"] = "fixed"
