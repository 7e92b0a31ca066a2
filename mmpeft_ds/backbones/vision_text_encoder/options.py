"""Options of the backbone `vision_text_encoder`: two towers, how they are joined, and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.backbones.common.vision_options import VisionOptions
from mmpeft_ds.fitting import ByOption


@dataclass
class Options(VisionOptions):
    """Keys of the recipe's `backbone` section, in addition to those of `VisionOptions`.

    Attributes:
        text: hub name, local directory or packaged:NAME of a bert or roberta encoder.
        max_text_length: tokens of a text with its special tokens, without the prefix; longer ones lose their
            middle.
        embed_twice: send prefix and embedded text through the embedding module again (positions, type, LayerNorm).
        head_input: `pooler` (frozen) of the first position, the `raw` first position, or the `mean` of all.
        head_layers: 1 (dropout, Linear) or 2 (Linear, LayerNorm, GELU, dropout, Linear).
        head_multiple: inner width of the head as a multiple of the text width.
        head_dropout: dropout of the head; 0 in the paper, whose one-layer heads use the encoder's hidden dropout.
        num_labels: size of the head, 0 = from the label list of the data.
    """

    gives: ClassVar[ByOption] = {"": ("answer scores",)}

    text: str = "roberta-base"
    max_text_length: int = 19
    embed_twice: bool = True
    head_input: Literal["pooler", "raw", "mean"] = "pooler"
    head_layers: Literal[1, 2] = 2
    head_multiple: int = 2
    head_dropout: float = 0.0
    num_labels: int = 0
