"""Backbone: CLIP or SigLIP as a dual encoder, for retrieval and for classification by class texts.

The model is transformers' own CLIPModel or SiglipModel (same parameter names) whose forward takes the packed batch.
"""

# I images, T texts, L text length, p width of the shared space

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedModel, SiglipModel

from mmpeft_ds.backbones.base import ImagePrefix
from mmpeft_ds.backbones.clip.model import PackedClip, shared_width
from mmpeft_ds.backbones.clip.options import Options
from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.encoders import EncoderPair
from mmpeft_ds.backbones.common.stock_backbone import WHERE, StockBackbone
from mmpeft_ds.backbones.common.texts import collated
from mmpeft_ds.backbones.common.transform import SquareTransform
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.base import base_model

STOCK = {"clip": CLIPModel, "siglip": SiglipModel}


class ClipBackbone(StockBackbone, EncoderPair):
    """CLIP and SigLIP as recipes use them."""

    Options = Options
    families = tuple(STOCK)

    def check(self) -> None:
        """Refuse what cannot work, from configurations only."""
        o, config = self.options, self._config
        patch, positions = config.vision_config.patch_size, config.text_config.max_position_embeddings
        if o.image_size < 0 or o.image_size % patch:
            raise BadInput(f"backbone.image_size: {o.image_size} is no multiple of the patch size {patch}.")
        if o.max_text_length and not 3 <= o.max_text_length <= positions:
            raise BadInput(
                f"backbone.max_text_length: {o.max_text_length}, but {o.model!r} takes 3 to {positions} tokens. "
                "Use 0 for all positions."
            )
        if self._siglip and o.max_text_length not in (0, positions):
            raise BadInput(
                f"backbone.max_text_length: SigLIP reads its last position and was trained with texts padded to "
                f"{positions}. Use 0."
            )

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The pretrained model, everything frozen."""
        model_class = stock.publishing(PackedClip, STOCK[self._config.model_type])
        o, config = self.options, copy.deepcopy(self._config)
        config.condition = o.condition  # saved with the model
        load = (model_class, o.model, WHERE, config, self.dtype, self.attention)
        return stock.load(*load, o.random_weights, on_meta, self.device, o.quantise)

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Resize to the tower's input; no augmentation."""
        o = self.options
        return SquareTransform(
            o.image_size or self._config.vision_config.image_size,
            o.fit if o.fit != "auto" else "stretch" if self._siglip else "crop",
            tower_loading.interpolation(o.resample, self._pixels),
        )

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """Token ids and mask, as long as the longest text of this batch; SigLIP's padded to its full length. Longer
        texts lose their end."""
        plain = [f"{t.prompt} {t.target}".strip() if isinstance(t, Prompted) else t for t in texts]
        length = self.options.max_text_length or self._config.text_config.max_position_embeddings
        words = [one.without_end(length - self._texts.frame_length) for one in self._texts.words(plain)]
        padded = self._texts.padded(words, length if self._siglip else None)
        # SigLIP attends to its padding, as it was trained
        names = ("input_ids",) if self._siglip else ("input_ids", "attention_mask")
        return collated({name: padded[name] for name in names}, words)

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """Each tower without a trainable, or its embeddings."""
        return stock.untrained(model, {"vision_model": "embeddings", "text_model": "embeddings"})

    def image_prefix(self, model: nn.Module) -> ImagePrefix | None:
        """The vision tower and its projection into the shared space."""
        base, parts = base_model(model), ("vision_model", *(() if self._siglip else ("visual_projection",)))
        if any(p.requires_grad for part in parts for p in base.get_submodule(part).parameters()):
            return None
        choice = {key: self._pixels[key] for key in ("mean", "std")}
        return ImagePrefix(parts, choice | {"config": stock.arithmetic(self._config.vision_config)})

    @torch.no_grad()
    def image_values(self, model: Any, images: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """(p,) raw vector of each image in the shared space."""
        pixels = self._normalised(images)["pixel_values"]
        return [{"pixel_values": x} for x in base_model(model).project_images(pixels)]

    @property
    def feature_widths(self) -> tuple[int, int]:
        """Width of the shared space, for images as for texts."""
        return (shared_width(self._config),) * 2

    def logit_scale_of(self, model: nn.Module) -> float:
        """The checkpoint's 1 / temperature."""
        return float(model.logit_scale.double().exp())

    def towers_key(self) -> str:
        """Hash of weights, configuration, image transform and length of texts, on which features depend."""
        o = self.options
        weights = "random" if o.random_weights else tower_loading.weights_hash(o.model, WHERE)
        transform = dataclasses.asdict(self.image_transform(False))
        pixels = {key: self._pixels[key] for key in ("mean", "std")}
        form = [] if o.quantise == "none" else [o.quantise]  # without it as earlier versions wrote it
        return stock.tower_key([weights, transform, pixels, o.max_text_length, *form], self._config)

    @property
    def condition_width(self) -> int | None:
        """Width of the shared space, None without a condition."""
        return None if self.options.condition == "none" else shared_width(self._config)

    @property
    def _siglip(self) -> bool:
        return self._config.model_type == "siglip"


ENTRY = ClipBackbone
