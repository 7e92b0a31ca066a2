"""The composed model: a vision tower seen once per image, a text encoder that reads prefix and question, a head.

Source: RoBERTa + ViT of the routing paper (arXiv 2403.09377; specs/routing.md 2.1), each of its choices an option.
"""

# S slots, I images, T texts, L text length, k most images of a slot, m vectors of an image, P prefix length, d width

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput

from mmpeft_ds.backbones._towers import empty_tower, vision_features
from mmpeft_ds.sites import condition as condition_context
from mmpeft_ds.sites.condition import Condition, conditioned


class VisionTextEncoderConfig(PretrainedConfig):
    """Both towers and how they are joined; the options of `backbones/vision_text_encoder.py` explain the fields.

    `vision_config` and `text_config` are configurations or their dictionaries. `num_labels` and `id2label` mean what
    they mean everywhere in transformers; `feature_mean` and `feature_std` belong to `feature_norm: zscore`.
    """

    model_type = "mmpeft_vision_text_encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: PretrainedConfig | dict | None = None
    text_config: PretrainedConfig | dict | None = None
    vision_feature: str = "pooler"
    vision_norm: bool = True
    prefix: str = "pooled"
    condition: str = "pooled"
    embed_twice: bool = True
    head_input: str = "pooler"
    head_layers: int = 2
    head_multiple: int = 2
    head_dropout: float = 0.0
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


@dataclass
class VisionTextEncoderOutput(ModelOutput):
    """What the model returns.

    Attributes:
        logits: (T, num_labels).
        image_features: (I, m, d) as the tower gave them, before `feature_norm`, to be passed back instead of pixels;
            row 0 of an image is its pooled vector. None without images.
        last_hidden_state: (T, P + L, d), if it was asked for.
    """

    logits: Tensor | None = None
    image_features: Tensor | None = None
    last_hidden_state: Tensor | None = None


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


class HeadLinear(nn.Linear):
    """Linear with weights from N(0, 0.02) and no bias to begin with, set before ZeRO-3 partitions them."""

    std = 0.02

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Head(nn.Module):
    """Classifier on one vector a text: dropout, Linear; or Linear, LayerNorm, GELU, dropout, Linear."""

    def __init__(self, config: VisionTextEncoderConfig):
        super().__init__()
        width = config.text_config.hidden_size
        inner = width * config.head_multiple
        self.deep = config.head_layers == 2
        if self.deep:
            self.dense = HeadLinear(width, inner)
            self.norm = nn.LayerNorm(inner, eps=1e-5)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out = HeadLinear(inner if self.deep else width, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        # trained in float32 also where the base is bfloat16
        x = x.to(self.out.weight.dtype)
        if self.deep:
            x = nn.functional.gelu(self.norm(self.dense(x)))
        return self.out(self.dropout(x))


class VisionTextEncoder(PreTrainedModel):
    """Vision tower, text encoder, head. Build from a configuration, or from two loaded towers.

    Attributes:
        head_modules: modules that are trained in full (peft's `modules_to_save`).
    """

    config_class = VisionTextEncoderConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    head_modules = ("head",)

    def __init__(
        self,
        config: VisionTextEncoderConfig,
        vision: PreTrainedModel | None = None,
        text: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = vision or empty_tower(config.vision_config, "vision", config.vision_feature == "pooler")
        self.text_model = text or empty_tower(config.text_config, "text", config.head_input == "pooler")
        for tower, key in ((self.vision_model, "vision_config"), (self.text_model, "text_config")):
            # one object, so that later changes (attention implementation) reach both
            getattr(config, key)._attn_implementation = tower.config._attn_implementation
            tower.config = getattr(config, key)
        self.pixel_norm = Affine(config.pixel_mean, config.pixel_std, dim=1, scale=1 / 255)
        if config.feature_norm == "zscore":
            self.feature_norm = Affine(config.feature_mean, config.feature_std, dim=2)
        else:
            self.feature_norm = None
        self.head = Head(config)
        # Modules as pretrained, without the adapters that come later. The tuple of lists is no submodule to nn.Module.
        object.__setattr__(self, "_frozen", (list(self.vision_model.modules()), list(self.text_model.modules())))
        self.text_model.encoder.layer[-1].attention.output.register_forward_pre_hook(_only_read)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def train(self, mode: bool = True) -> VisionTextEncoder:
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        return_last_hidden_state: bool = False,
        return_dict: bool | None = None,
    ) -> VisionTextEncoderOutput:
        """Answer every text from the images of its slot.

        Args:
            input_ids: (T, L).
            attention_mask: (T, L), 1 = keep; None keeps all.
            pixel_values: (I, 3, H, W), uint8 (normalised here) or floating point (normalised already).
            image_features: (I, m, d) or (I, d) in place of pixels, as an earlier call returned them, or feature
                shards hold them; `feature_norm` is applied here.
            image_owner: (I,) slot of each image, non-decreasing; None: image i belongs to slot i.
            text_owner: (T,) slot of each text; None: text j belongs to slot j.
            num_slots: S; None: as many as texts.
            return_last_hidden_state: finish the last layer for all positions, and return them. The head reads one
                position a text (or the mean of all), and without need the others end at the last attention.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
        """
        images = self.encode_images(pixel_values, image_features)
        normed = images if images is None or self.feature_norm is None else self.feature_norm(images)
        vectors, keep = self._of_texts(normed, input_ids, image_owner, text_owner, num_slots)
        prefix, prefix_keep = self._prefix(vectors, keep)
        hidden, mask = self._embed(input_ids, attention_mask, prefix, prefix_keep)
        condition, read = self._condition(vectors, keep, attention_mask, prefix_keep), None
        if self.config.head_input != "mean":
            read = _first_position(prefix_keep, hidden.shape[1])
            if not return_last_hidden_state and self._last_layer_is_tokenwise():
                condition = dataclasses.replace(condition, read=read)
        with conditioned(condition):
            hidden = self.text_model.encoder(hidden, attention_mask=mask).last_hidden_state
        logits = self.head(self._head_input(hidden, attention_mask, prefix_keep, read))
        return VisionTextEncoderOutput(
            logits=logits, image_features=images, last_hidden_state=hidden if return_last_hidden_state else None
        )

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
        return next(self.text_model.embeddings.parameters()).dtype

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
        if self.config.condition == "tokens" and vectors.shape[1]:
            return Condition(*self._pick(vectors, keep, "tokens"), own_mask=own)
        count = keep.sum(1).clamp(min=1).to(vectors.dtype)
        return Condition(vectors[:, :, 0].sum(1, keepdim=True) / count[:, None, None], own_mask=own)

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor | None, prefix: Tensor | None, prefix_keep: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Input of the first layer (T, P + L, d) and the attention mask in the form that the implementation wants.

        Positions count the prefix tokens that a text really has, so that its answer does not depend on how many images
        other texts of the batch have.
        """
        embeddings = self.text_model.embeddings
        hidden = embeddings(input_ids=input_ids)
        if prefix is not None:
            hidden = torch.cat([prefix, hidden], 1)
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            attention_mask = torch.cat([prefix_keep.to(attention_mask.dtype), attention_mask], 1)
        if self.config.prefix != "none" and self.config.embed_twice:
            # also where no text has an image, or the answer would depend on the rest of the batch
            steps = torch.ones_like(input_ids)
            positions = torch.cat([prefix_keep.to(steps.dtype), steps], 1).cumsum(1).sub(1).clamp(min=0)
            # RoBERTa counts from padding_idx + 1, BERT from 0
            first = getattr(embeddings, "padding_idx", -1) + 1
            hidden = embeddings(inputs_embeds=hidden, position_ids=positions + first)
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.text_model.config, inputs_embeds=hidden, attention_mask=attention_mask
            )
        return hidden, attention_mask

    def _last_layer_is_tokenwise(self) -> bool:
        """After its attention the last layer mixes no tokens, whatever adapters are in it."""
        layer = self.text_model.encoder.layer[-1]
        parts = (layer.attention.output, layer.intermediate, layer.output)
        wrappers = [m for part in parts for m in part.modules() if hasattr(m, "base_layer")]
        return all(getattr(m, "tokenwise", False) for m in wrappers)

    def _head_input(
        self, hidden: Tensor, attention_mask: Tensor | None, prefix_keep: Tensor, read: Tensor | None
    ) -> Tensor:
        """(T, d): the position that is read, raw or through the frozen pooler, or the mean of all that count."""
        length = prefix_keep.shape[1]
        if read is None:
            words = torch.ones(hidden.shape[0], hidden.shape[1] - length, device=hidden.device)
            keep = torch.cat(
                [prefix_keep.to(words.dtype), words if attention_mask is None else attention_mask.to(words.dtype)], 1
            )
            keep = keep.to(hidden.dtype).unsqueeze(2)
            return (hidden * keep).sum(1) / keep.sum(1)
        first = _take(hidden, read) if hidden.shape[1] == read.shape[1] else hidden
        return self.text_model.pooler(first) if self.config.head_input == "pooler" else first[:, 0]


def _first_position(prefix_keep: Tensor, length: int) -> Tensor:
    """(T, L) bool: position 0, or the first token of the text itself where it has no image."""
    prefix = prefix_keep.shape[1]
    read = torch.zeros(len(prefix_keep), length, dtype=torch.bool, device=prefix_keep.device)
    if prefix == 0:
        read[:, 0] = True
    else:
        read[:, 0] = prefix_keep[:, 0]
        read[:, prefix] = ~prefix_keep[:, 0]
    return read


def _take(hidden: Tensor, read: Tensor) -> Tensor:
    """(T, 1, d) the position of each row that `read` marks."""
    at = read.to(torch.uint8).argmax(1)
    return hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2]))


def _only_read(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Forward pre-hook of the last layer's attention output: from here on no token sees another."""
    condition = condition_context.current()
    read = None if condition is None else condition.read
    # another length: somebody has inserted tokens of their own
    if read is None or any(a.shape[1] != read.shape[1] for a in args):
        return None
    return tuple(_take(a, read) for a in args)


AutoConfig.register(VisionTextEncoderConfig.model_type, VisionTextEncoderConfig, exist_ok=True)
AutoModel.register(VisionTextEncoderConfig, VisionTextEncoder, exist_ok=True)
