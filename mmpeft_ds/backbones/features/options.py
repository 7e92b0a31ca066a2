"""Options of the backbone `features`: which features are stored and which an encoder computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mmpeft_ds.backbones.common.options import BackboneOptions
from mmpeft_ds.fitting import ByOption


@dataclass
class Options(BackboneOptions):
    """Keys of the recipe's `backbone` section.

    Attributes:
        encoder: `name` and options of a backbone whose frozen towers compute features; null: all of them are stored.
        images: `stored` in feature shards, or `live` through the encoder, from pixels.
        texts: features of captions: `stored`, or `live` through the encoder; `none` leaves captions out.
        ensemble: how the templates of a class become one text: `unit` averages unit vectors, `raw` the vectors as they
            are.
        templates, negative_templates: class texts where none are stored; `{}` stands for the name of a class.
    """

    gives: ClassVar[ByOption] = {"": ("class scores",)}

    encoder: dict[str, Any] | None = field(default=None, metadata={"component": "backbones"})
    images: Literal["stored", "live"] = "stored"
    texts: Literal["none", "stored", "live"] = "stored"
    ensemble: Literal["unit", "raw"] = "unit"
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    negative_templates: list[str] = field(default_factory=lambda: ["a photo of no {}."])
