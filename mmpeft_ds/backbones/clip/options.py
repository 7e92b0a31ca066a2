"""Options of the backbone `clip`: a checkpoint and how it reads images and texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.backbones.common.options import BackboneOptions, Quantise
from mmpeft_ds.fitting import ByOption


@dataclass
class Options(BackboneOptions):
    """Keys of the recipe's `backbone` section.

    Attributes:
        model: hub name or local directory of a clip or siglip model.
        random_weights: take only its configuration and tokenizer; for tests and measurements.
        quantise: weights of the frozen linear layers in blocks of all towers: `nf4` (bitsandbytes), `int8` or `fp8`
            (torchao); `none`: as engine.dtype says. Below ZeRO stage 3; docs/quantised.md.
        image_size: side of the square input in pixels, a multiple of the patch size; 0 = the checkpoint's.
        fit: `crop` the centre or `stretch` the image to the square; `auto`: CLIP crops, SigLIP stretches.
        resample: `bilinear`, `bicubic`, or `auto` = as the checkpoint was trained.
        max_text_length: tokens of a text with its special tokens, 0 = as many as the model has positions;
            longer ones lose their end.
        condition: what adapters of the text tower route on: `none`, or the `pooled` image vector in the shared space.
            Not for retrieval, where a text that routes on its own image reveals the pair.
    """

    gives: ClassVar[ByOption] = {"": ("image and text features",)}

    model: str = "openai/clip-vit-base-patch16"
    random_weights: bool = False
    quantise: Quantise = "none"
    image_size: int = 0
    fit: Literal["auto", "crop", "stretch"] = "auto"
    resample: Literal["auto", "bilinear", "bicubic"] = "auto"
    max_text_length: int = 0
    condition: Literal["none", "pooled"] = "none"
