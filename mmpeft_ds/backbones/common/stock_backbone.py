"""Shared parts of backbones around one whole model of transformers: its configuration, tokenizer, pixel statistics.

Their options have `model`, a hub name or local directory.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.texts import TextIds
from mmpeft_ds.backbones.common.vision_model import Affine
from mmpeft_ds.data.batch import PackedBatch

WHERE = "backbone.model"


class StockBackbone(BackboneBase):
    """Base of such a backbone.

    Attributes:
        families: the `model_type`s of the checkpoints that it takes.
    """

    families: ClassVar[tuple[str, ...]]

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments; pixels are normalised here, on the device of the batch."""
        return {**super().inputs(batch), **self._images(batch)}

    def _images(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Forward arguments of the image side, pixels normalised."""
        return self._normalised(batch.images)

    def _normalised(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """`images` with standardised pixels; what is floating point, such as values of a frozen tower, stays."""
        pixels = images.get("pixel_values")
        if pixels is None or pixels.is_floating_point():
            return dict(images)
        return {**images, "pixel_values": self._normalise(pixels)}

    @functools.cached_property
    def _config(self) -> PretrainedConfig:
        return stock.read_config(self.options.model, WHERE, self.families)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return stock.read_tokenizer(self.options.model, WHERE)

    @functools.cached_property
    def _texts(self) -> TextIds:
        return TextIds(self._tokenizer)

    @functools.cached_property
    def _pixels(self) -> dict[str, Any]:
        return tower_loading.image_processor(self.options.model, self._config.vision_config, WHERE)

    @functools.cached_property
    def _normalise(self) -> Affine:
        return Affine(self._pixels["mean"], self._pixels["std"], dim=1, scale=1 / 255)
