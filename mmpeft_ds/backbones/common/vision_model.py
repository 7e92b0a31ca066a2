"""The image side of composed models: a vision tower seen once per image, a prefix for the text, the condition.

Shared by the encoder and the decoder that stand behind it.
"""

# S slots, I images, T texts, L text length, k most images of a slot, m vectors of an image, P prefix length, d width

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mmpeft_ds.backbones.common.tower_loading import vision_features
from mmpeft_ds.sites import condition as condition_context
from mmpeft_ds.sites.condition import Condition


class VisionSideConfig(PretrainedConfig):
    """Both towers and how the image reaches the text; the options of the backbones explain the fields.

    `vision_config` and `text_config` are configurations or their dictionaries; `feature_mean` and `feature_std` belong
    to `feature_norm: zscore`.
    """

    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: PretrainedConfig | dict | None = None
    text_config: PretrainedConfig | dict | None = None
    vision_feature: str = "pooler"
    vision_norm: bool = True
    prefix: str = "pooled"
    condition: str = "pooled"
    feature_norm: str = "none"
    feature_mean: list[float] | None = None
    feature_std: list[float] | None = None
    pixel_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    train_dropout: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for key in self.sub_configs:
            value = getattr(self, key)
            if isinstance(value, dict):
                value = dict(value)
                setattr(self, key, AutoConfig.for_model(value.pop("model_type"), **value))
        super().__post_init__(**kwargs)

    @property
    def with_tokens(self) -> bool:
        """All tokens of an image are used, not only its pooled vector."""
        return "tokens" in (self.prefix, self.condition)


class Affine(nn.Module):
    """(x - mean) / std over one dimension, in at least float32.

    The statistics are constants of the configuration and not buffers: a buffer would be rounded to bfloat16 with the
    base, and is left empty by loaders that build on the meta device.
    """

    def __init__(self, mean: list[float], std: list[float], dim: int, scale: float = 1.0):
        super().__init__()
        self.mean, self.std, self.dim, self.scale = list(mean), list(std), dim, scale
        self._ready: dict[tuple, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
        key = (x.device, dtype, x.dim())
        if key not in self._ready:
            shape = [1] * x.dim()
            shape[self.dim] = -1
            std = torch.tensor(self.std, dtype=torch.float64)
            mean = torch.tensor(self.mean, dtype=torch.float64)
            # one fused multiply and add: x * factor + shift
            pair = (self.scale / std, -mean / std)
            self._ready[key] = tuple(t.view(shape).to(x.device, dtype) for t in pair)
        factor, shift = self._ready[key]
        return torch.addcmul(shift, x.to(dtype), factor)

    def frozen_constants(self) -> dict[str, Tensor]:
        """What the fingerprint of the frozen base covers of this module."""
        return {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("mean", "std")}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}


class VisionSide:
    """Mixin of a composed `PreTrainedModel`; its constructor calls `_join_towers` when both towers exist."""

    def _join_towers(self, vision: PreTrainedModel | None, text: PreTrainedModel) -> None:
        config = self.config
        self.vision_model, self.text_model = vision, text
        for tower, key in ((vision, "vision_config"), (text, "text_config")):
            if tower is None:  # its features are stored
                continue
            # one object, so that later changes (attention implementation) reach both
            getattr(config, key)._attn_implementation = tower.config._attn_implementation
            tower.config = getattr(config, key)
        self.pixel_norm = Affine(config.pixel_mean, config.pixel_std, dim=1, scale=1 / 255)
        zscore = config.feature_norm == "zscore"
        self.feature_norm = Affine(config.feature_mean, config.feature_std, dim=2) if zscore else None
        # Modules as pretrained, without the adapters that come later. The tuple of lists is no submodule to nn.Module.
        modules = tuple([] if tower is None else list(tower.modules()) for tower in (vision, text))
        object.__setattr__(self, "_frozen", modules)

    def train(self, mode: bool = True) -> VisionSide:
        """Frozen towers stay in eval mode; adapters inside them and the head follow `mode`."""
        super().train(mode)
        vision, text = self._frozen
        for modules in (vision, [] if self.config.train_dropout else text):
            for module in modules:
                # transformers recomputes a layer only if the layer itself is in training mode; its dropouts stay off
                module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **kwargs
    ):
        """Recompute layers under the condition of their own forward (`sites.condition.checkpoint`)."""
        given = getattr(gradient_checkpointing_func, "keywords", {})
        function = functools.partial(condition_context.checkpoint, **given)
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=function, **kwargs)
        self.train(self.training)

    def encode_images(self, pixel_values: Tensor | None, image_features: Tensor | None = None) -> Tensor | None:
        """(I, m, d) features as the tower gives them, m = 1 or 1 + tokens; None without images."""
        if image_features is not None:
            features = image_features.unsqueeze(1) if image_features.dim() == 2 else image_features
            if self.config.with_tokens and features.shape[1] < 2:
                raise ValueError("prefix or condition `tokens` needs stored features of all tokens: (I, 1 + n, d)")
            return features
        if pixel_values is None or len(pixel_values) == 0:
            return None
        if not pixel_values.is_floating_point():
            pixel_values = self.pixel_norm(pixel_values)
        # dtype of a parameter: under ZeRO-3 its shape is gone, its dtype stays
        pixel_values = pixel_values.to(next(self.vision_model.parameters()).dtype)
        tuned = any(p.requires_grad for p in self.vision_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and tuned):
            c = self.config
            return vision_features(self.vision_model, pixel_values, c.vision_feature, c.vision_norm, c.with_tokens)

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
            images = torch.zeros(0, 1, self.config.vision_config.hidden_size, device=device, dtype=self._dtype())
        images = images.to(self._dtype())
        if image_owner is None:
            image_owner = torch.arange(len(images), device=device)
        if text_owner is None:
            text_owner = torch.arange(texts, device=device)
        slots = texts if slots is None else slots
        counts = torch.zeros(slots, dtype=torch.int64, device=device).index_add(
            0, image_owner, torch.ones_like(image_owner)
        )
        most = int(counts.max()) if len(images) else 0
        place = torch.arange(len(images), device=device) - (counts.cumsum(0) - counts)[image_owner]
        by_slot = images.new_zeros(slots, most, *images.shape[1:]).index_put((image_owner, place), images)
        keep = torch.arange(most, device=device) < counts[:, None]
        return by_slot[text_owner], keep[text_owner]

    def _dtype(self) -> torch.dtype:
        return next(self.get_input_embeddings().parameters()).dtype

    def _pick(self, vectors: Tensor, keep: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """(T, k * n, d) and (T, k * n): the pooled vector of every image (n = 1), or all its tokens."""
        chosen = vectors[:, :, :1] if what == "pooled" else vectors[:, :, 1:]
        return chosen.flatten(1, 2), keep.repeat_interleave(chosen.shape[2], 1)

    def _prefix(self, vectors: Tensor, keep: Tensor) -> tuple[Tensor | None, Tensor]:
        """Prefix (T, P, d) and which of it counts (T, P)."""
        if self.config.prefix == "none" or vectors.shape[1] == 0:
            return None, keep[:, :0]
        return self._pick(vectors, keep, self.config.prefix)

    def _condition(
        self, vectors: Tensor, keep: Tensor, attention_mask: Tensor | None, prefix_keep: Tensor
    ) -> Condition:
        """What adapters may route on: the mean over the slot's images, or all their tokens; zeros without image."""
        own = None
        if attention_mask is not None:
            own = torch.cat([prefix_keep, attention_mask.bool()], 1)
        if self.config.condition == "none":
            return Condition(own_mask=own)
        if self.config.condition == "tokens":
            if vectors.shape[1]:
                return Condition(*self._pick(vectors, keep, "tokens"), own_mask=own)
            # as a text without image is told beside texts that have one: tokens, none of which counts
            nothing = vectors.new_zeros(len(vectors), 1, vectors.shape[-1])
            return Condition(nothing, keep.new_zeros(len(keep), 1), own_mask=own)
        count = keep.sum(1).clamp(min=1).to(vectors.dtype)
        return Condition(vectors[:, :, 0].sum(1, keepdim=True) / count[:, None, None], own_mask=own)
