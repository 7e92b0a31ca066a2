"""The image side of composed models: a vision tower that runs once per image, a prefix for the text, the condition.

The models of `dual_encoder`, `vision_text_encoder` and `vision_text_decoder` have it.
"""

# S slots, I images, T texts, L text length, k most images of a slot, m vectors of an image, P prefix length, d width

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmpeft_ds.backbones.common.affine import Affine
from mmpeft_ds.backbones.common.composed import ComposedConfig, ComposedModel
from mmpeft_ds.backbones.common.slots import images_per_slot, most_images
from mmpeft_ds.host_copies import on_host
from mmpeft_ds.sites.condition import Condition


class VisionSideConfig(ComposedConfig):
    """Both towers and how the image reaches the text; the options of the backbones explain the fields.

    `feature_mean` and `feature_std` belong to `feature_norm: zscore`.
    """

    vision_feature: str = "pooler"
    vision_norm: bool = True
    prefix: str = "pooled"
    condition: str = "pooled"
    feature_norm: str = "none"
    feature_mean: list[float] | None = None
    feature_std: list[float] | None = None
    train_dropout: bool = False

    @property
    def with_tokens(self) -> bool:
        """All tokens of an image are used, not only its pooled vector."""
        return "tokens" in (self.prefix, self.condition)


class VisionSide(ComposedModel):
    """A composed model whose text model reads image vectors, as a prefix or through the condition."""

    def _join_towers(self, vision: PreTrainedModel | None, text: PreTrainedModel) -> None:
        config = self.config
        self._join(vision, text, text_follows_mode=config.train_dropout)
        zscore = config.feature_norm == "zscore"
        self.feature_norm = Affine(config.feature_mean, config.feature_std, dim=2) if zscore else None

    def encode_images(self, pixel_values: Tensor | None, image_features: Tensor | None = None) -> Tensor | None:
        """(I, m, d) features as the tower gives them, m = 1 or 1 + tokens; None without images."""
        if image_features is not None:
            features = image_features.unsqueeze(1) if image_features.dim() == 2 else image_features
            if self.config.with_tokens and features.shape[1] < 2:
                raise ValueError("prefix or condition `tokens` needs stored features of all tokens: (I, 1 + n, d)")
            return features
        if pixel_values is None or len(pixel_values) == 0:
            return None
        return self._through_vision_tower(pixel_values, self.config.vision_feature, self.config.with_tokens)

    def _of_texts(
        self,
        images: Tensor | None,
        input_ids: Tensor,
        image_owner: Tensor | None,
        text_owner: Tensor | None,
        slots: int | None,
    ) -> tuple[Tensor, Tensor]:
        """(T, k, m, d) features of the images that each text sees, zeros where its slot has fewer, and (T, k) keep."""
        texts, device = len(input_ids), input_ids.device
        if images is None:
            images = torch.zeros(0, 1, self._vector_width(), device=device, dtype=self._dtype())
        images = images.to(self._dtype())
        if image_owner is None:
            image_owner = torch.arange(len(images), device=device)
        if text_owner is None:
            text_owner = torch.arange(texts, device=device)
        slots = texts if slots is None else slots
        counts, most = images_per_slot(image_owner, slots), most_images(image_owner)
        place = torch.arange(len(images), device=device) - (counts.cumsum(0) - counts)[image_owner]
        by_slot = images.new_zeros(slots, most, *images.shape[1:]).index_put((image_owner, place), images)
        keep = torch.arange(most, device=device) < counts[:, None]
        return by_slot[text_owner], keep[text_owner]

    def _vector_width(self) -> int:
        """Width of the image vectors that become prefix and condition."""
        return self.config.vision_config.hidden_size

    def _dtype(self) -> torch.dtype:
        return next(self.get_input_embeddings().parameters()).dtype

    def _pick(self, vectors: Tensor, keep: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """(T, k * n, d) and (T, k * n): the pooled vector of every image (n = 1), or all its tokens."""
        chosen = vectors[:, :, :1] if part == "pooled" else vectors[:, :, 1:]
        return chosen.flatten(1, 2), keep.repeat_interleave(chosen.shape[2], 1)

    def _prefix(self, vectors: Tensor, keep: Tensor) -> tuple[Tensor | None, Tensor]:
        """Prefix (T, P, d), None without one, and which of its positions count (T, P)."""
        if self.config.prefix == "none" or vectors.shape[1] == 0:
            return None, keep[:, :0]
        return self._pick(vectors, keep, self.config.prefix)

    def _kept_prefix(
        self, prefix_keep: Tensor, keep: Tensor, image_owner: Tensor | None, text_owner: Tensor | None
    ) -> int:
        """Positions of the prefix that count, in all texts; known on the host where the owners are."""
        if 0 in prefix_keep.shape or image_owner is None or text_owner is None:
            return int(prefix_keep.sum())
        slots = on_host(text_owner)
        images = on_host(image_owner).bincount(minlength=int(slots.max()) + 1)
        return int(images[slots].sum()) * (prefix_keep.shape[1] // keep.shape[1])

    def _condition(
        self, vectors: Tensor, keep: Tensor, attention_mask: Tensor | None, prefix_keep: Tensor
    ) -> Condition:
        """Vectors that adapters may route on: the mean over the slot's images, or all tokens; zeros without image."""
        own = None
        if attention_mask is not None:
            own = torch.cat([prefix_keep, attention_mask.bool()], 1)
        if self.config.condition == "none":
            return Condition(own_mask=own)
        if self.config.condition == "tokens":
            if vectors.shape[1]:
                return Condition(*self._pick(vectors, keep, "tokens"), own_mask=own)
            # as for a text without image in a batch where others have one: tokens, none of which counts
            nothing = vectors.new_zeros(len(vectors), 1, vectors.shape[-1])
            return Condition(nothing, keep.new_zeros(len(keep), 1), own_mask=own)
        count = keep.sum(1).clamp(min=1).to(vectors.dtype)
        return Condition(vectors[:, :, 0].sum(1, keepdim=True) / count[:, None, None], own_mask=own)
