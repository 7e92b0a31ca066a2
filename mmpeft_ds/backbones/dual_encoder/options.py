"""Options of the backbone `dual_encoder`: two towers, the features of each side, and projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.backbones.common.options import BackboneOptions
from mmpeft_ds.fitting import ByOption


@dataclass
class Options(BackboneOptions):
    """Keys of the recipe's `backbone` section.

    Attributes:
        model: directory of a dual encoder saved completely (`launchers/merge.py`); it fixes what is built, and the
            keys from `vision` to `width` are left out.
        vision: hub name, local directory or packaged:NAME of a vit, deit, dinov2, clip or siglip vision tower.
        vision_layers: use the first n layers only, 0 = all.
        image_size: side of the square input in pixels, a multiple of the patch size.
        fit: `stretch` the whole image to the square, or `crop` its centre.
        resample: `bilinear`, `bicubic`, or `auto` = as the checkpoint was trained.
        vision_feature: the vector of an image: `pooler` (what the family pools), `cls`, or the `mean` of the patches.
        vision_norm: apply the tower's LayerNorm after its last layer; false needs `cls` or `mean`.
        text: hub name, local directory or packaged:NAME of a bert or roberta encoder.
        text_feature: the vector of a text: `pooler`, `cls` (the first position), or the `mean` without padding.
        projection: `none`; `linear`, a matrix without bias; `mlp`, LayerNorm, Linear, GELU, dropout, Linear.
        width: width of the shared space after the projections.
        max_text_length: tokens of a text with its special tokens; longer ones lose their end.
        projection_dropout: dropout inside `mlp`.
        logit_scale: initial factor of the cosine, 1 / temperature; a `model` has its own.
        train_projection, train_logit_scale: train these in full, with the method.
        images: `live`: pixels through the vision tower; `stored`: its features come with the data (feature shards),
            the tower is not built, and each visit in training takes one of the augmented passes at random.
        random_weights: build both towers from their configurations alone, with a fixed seed; for tests.
    """

    gives: ClassVar[ByOption] = {"": ("image and text features",)}

    model: str = ""
    vision: str = ""
    vision_layers: int = 0
    image_size: int = 224
    fit: Literal["stretch", "crop"] = "stretch"
    resample: Literal["auto", "bilinear", "bicubic"] = "auto"
    vision_feature: Literal["pooler", "cls", "mean"] = "cls"
    vision_norm: bool = True
    text: str = ""
    text_feature: Literal["pooler", "cls", "mean"] = "mean"
    projection: Literal["none", "linear", "mlp"] = "none"
    width: int = 256
    max_text_length: int = 64
    projection_dropout: float = 0.0
    logit_scale: float = 1 / 0.07
    train_projection: bool = True
    train_logit_scale: bool = False
    images: Literal["live", "stored"] = "live"
    random_weights: bool = False

    # what other backbones with a vision tower leave open
    prefix: ClassVar[str] = "none"
    condition: ClassVar[str] = "none"
    feature_norm: ClassVar[str] = "none"


# What a saved dual encoder fixes.
FIXED = (
    "vision", "vision_layers", "image_size", "fit", "resample", "vision_feature", "vision_norm", "text",
    "text_feature", "projection", "width",
)  # fmt: skip
