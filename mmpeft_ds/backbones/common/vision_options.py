"""Options about the image, shared by backbones with a vision tower and a text tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmpeft_ds.backbones.common.options import BackboneOptions, Quantise


@dataclass
class VisionOptions(BackboneOptions):
    """Keys of a recipe's `backbone` section that are about the image.

    Attributes:
        vision: hub name, local directory or packaged:NAME of a vit, deit, dinov2, clip or siglip vision tower.
        vision_layers: use the first n layers only, 0 = all.
        image_size: side of the square input in pixels, a multiple of the patch size.
        fit: `stretch` the whole image to the square, or `crop` its centre.
        resample: `bilinear`, `bicubic`, or `auto` = as the checkpoint was trained.
        vision_feature: the vector of an image: `pooler` (what the family pools), `cls`, or the `mean` of the patches.
        vision_norm: apply the tower's LayerNorm after its last layer; false needs `cls` or `mean`.
        feature_norm: `zscore` standardises each dimension with the statistics stored with the shards.
        prefix: vectors before the text: `none`, the `pooled` vector, or all `tokens` of an image.
        condition: what adapters route on: `none`, the `pooled` vector (mean over the images of a sample), or `tokens`.
        random_weights: build both towers from their configurations alone, with a fixed seed; for tests.
        quantise: weights of the frozen linear layers in blocks of all towers: `nf4` (bitsandbytes), `int8` or `fp8`
            (torchao); `none`: as engine.dtype says. Below ZeRO stage 3; docs/quantised.md.
    """

    vision: str = "google/vit-base-patch16-224-in21k"
    vision_layers: int = 0
    image_size: int = 224
    fit: Literal["stretch", "crop"] = "stretch"
    resample: Literal["auto", "bilinear", "bicubic"] = "auto"
    vision_feature: Literal["pooler", "cls", "mean"] = "pooler"
    vision_norm: bool = True
    feature_norm: Literal["none", "zscore"] = "none"
    prefix: Literal["none", "pooled", "tokens"] = "pooled"
    condition: Literal["none", "pooled", "tokens"] = "pooled"
    random_weights: bool = False
    quantise: Quantise = "none"
