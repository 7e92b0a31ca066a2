"""Granite 4 Vision: features of images enter several layers of the language model, none of them at its input."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.finishing import divided


class Granite4Vision(Family):
    """Features by layer."""

    model_types = ("granite4_vision",)
    unpackable = ""
    finishes = {"granite4_vision": divided}

    def apart(self, output: Any) -> Any:
        """With the features of the first layer as those of the images, and without the numbers of the layers."""
        layers, features = zip(*output.deepstack_features, strict=True)
        output.pooler_output, output.deepstack_features = list(features[0]), features
        output.into_layers = layers
        return output

    def joined(self, output: Any) -> Any:
        output.deepstack_features = list(zip(output.into_layers, output.deepstack_features, strict=True))
        return output


ENTRY = Granite4Vision()
