"""CLIP and SigLIP as dual encoders: transformers' own classes whose forward takes the packed batch."""

# I images, T texts, L text length, p width of the shared space

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PretrainedConfig

from mmpeft_ds.backbones.common.composed import DualEncoderOutput
from mmpeft_ds.backbones.common.stock import Publishing, mean_per_text
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.condition import Condition, conditioned, current


class PackedClip(Publishing):
    """Mixin over CLIPModel or SiglipModel: either side may be absent, and texts route on their own images.

    `config.condition` says what adapters of the text tower route on: `none`, or the `pooled` image vector.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        unit: bool = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DualEncoderOutput:
        """Features of images and texts.

        Args:
            input_ids, attention_mask: (T, L).
            pixel_values: (I, 3, H, W), normalised, or what `project_images` has returned for them.
            image_owner, text_owner: slot of each image and text; None: image i and text i belong to slot i. Only a
                condition needs them.
            num_slots: number of slots; None: as many as needed.
            unit: give unit vectors; otherwise features as they leave the projections.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
        """
        raw = texts = None
        if pixel_values is not None and len(pixel_values):
            raw = self.project_images(pixel_values)
        if input_ids is not None and len(input_ids):
            condition = current() or self._condition(
                input_ids, attention_mask, raw, image_owner, text_owner, num_slots
            )
            with conditioned(condition):
                texts = self.get_text_features(input_ids, attention_mask=attention_mask).pooler_output
        finish = _unit if unit else at_least_float32
        return DualEncoderOutput(
            image_features=None if raw is None else finish(raw),
            text_features=None if texts is None else finish(texts),
            logit_scale=at_least_float32(self.logit_scale).exp(),
            logit_bias=getattr(self, "logit_bias", None),  # only SigLIP has one
        )

    def project_images(self, pixel_values: Tensor) -> Tensor:
        """(I, p) vectors in the shared space, as they leave the projection; (I, p) given are returned."""
        if pixel_values.dim() == 2:
            return pixel_values
        parameter = next(self.vision_model.parameters())
        other_size = pixel_values.shape[-1] != self.config.vision_config.image_size
        return self.get_image_features(
            pixel_values.to(parameter.dtype), interpolate_pos_encoding=other_size
        ).pooler_output

    def _condition(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        raw: Tensor | None,
        image_owner: Tensor | None,
        text_owner: Tensor | None,
        num_slots: int | None,
    ) -> Condition:
        own = None if attention_mask is None else attention_mask.bool()
        if getattr(self.config, "condition", "none") == "none":
            return Condition(own_mask=own)
        device, texts = input_ids.device, len(input_ids)
        if raw is None:
            raw = torch.zeros(0, shared_width(self.config), device=device, dtype=self.dtype)
        if image_owner is None:
            image_owner = torch.arange(len(raw), device=device)
        if text_owner is None:
            text_owner = torch.arange(texts, device=device)
        slots = max(len(raw), texts) if num_slots is None else num_slots
        return Condition(mean_per_text(raw, image_owner, text_owner, slots).unsqueeze(1), own_mask=own)


def shared_width(config: PretrainedConfig) -> int:
    """Width of the space in which images and texts are compared; SigLIP has no projection beside its towers' heads."""
    return config.projection_dim if config.model_type == "clip" else config.text_config.projection_size


def _unit(x: Tensor) -> Tensor:
    return normalize(at_least_float32(x), dim=-1)
