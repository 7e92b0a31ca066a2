"""Options of the backbone `clip_bart`: where the grid features come from, and BART."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.backbones.common.options import BackboneOptions
from mmpeft_ds.fitting import ByOption


@dataclass
class Options(BackboneOptions):
    """Keys of the recipe's `backbone` section.

    Attributes:
        text: hub name or local directory of a bart model and its tokenizer.
        random_weights: take only its configuration and tokenizer; for tests and measurements.
        vision: empty: grid features are stored with the shards, (n, F) per image; else hub name, local directory or
            packaged:NAME of a vit, deit, dinov2, clip or siglip tower whose patches are the grid.
        vision_norm: apply the tower's LayerNorm after its last layer.
        image_size: side of the tower's square input in pixels, a multiple of the patch size.
        fit: `stretch` the whole image to the square, or `crop` its centre.
        resample: `bilinear`, `bicubic`, or `auto` = as the tower was trained.
        feature_width: F of stored features: 2048 for CLIP-RN101; a tower has its own.
        grid: side of the grid after adaptive max pooling, 0 = as it comes.
        max_images: images that a sample may have; each gets a trained embedding of its place among them.
        order_tokens: frozen rows added to the token table, which name the places in the grid.
        condition: what adapters route on. `visual`: in the encoder the mean of the visual embeddings, in the decoder
            the mean of the encoder's outputs at their places; `embedding`: the former in both; `tokens`: all visual
            embeddings; `none`.
        max_text_length: tokens of a prompt with its special tokens; longer ones lose their middle.
        max_target_length: tokens of a target with its special tokens; longer ones lose their end.
    """

    gives: ClassVar[ByOption] = {"": ("generated text",)}

    text: str = "facebook/bart-base"
    random_weights: bool = False
    vision: str = ""
    vision_norm: bool = True
    image_size: int = 224
    fit: Literal["stretch", "crop"] = "stretch"
    resample: Literal["auto", "bilinear", "bicubic"] = "auto"
    feature_width: int = 2048
    grid: int = 6
    max_images: int = 2
    order_tokens: int = 200
    condition: Literal["none", "visual", "embedding", "tokens"] = "visual"
    max_text_length: int = 20
    max_target_length: int = 40
