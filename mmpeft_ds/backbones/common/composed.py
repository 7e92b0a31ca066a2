"""Parts of models that are composed of a vision tower and a text model, each of which keeps its own class.

`ClipBart`, `DualEncoder`, `VisionTextEncoder` and `VisionTextDecoder` are made of them.
"""

# I images, T texts, m vectors of an image, p width of a shared space

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mmpeft_ds.backbones.common.affine import Affine
from mmpeft_ds.backbones.common.model_hooks import ModelHooks
from mmpeft_ds.backbones.common.recomputing import RecomputesUnderCondition
from mmpeft_ds.backbones.common.tower_loading import vision_features


class ComposedConfig(PretrainedConfig):
    """Configuration of two towers.

    Attributes:
        vision_config, text_config: configurations or their dictionaries.
        pixel_mean, pixel_std: statistics by which uint8 pixels are standardised after scaling to [0, 1].
        initializer_range: standard deviation of the weights that are not pretrained.
    """

    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: PretrainedConfig | dict | None = None
    text_config: PretrainedConfig | dict | None = None
    pixel_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self._read_sub_configs()
        super().__post_init__(**kwargs)

    def _read_sub_configs(self) -> None:
        for key in self.sub_configs:
            value = getattr(self, key)
            if isinstance(value, dict):
                value = dict(value)
                setattr(self, key, AutoConfig.for_model(value.pop("model_type"), **value))


class ComposedModel(ModelHooks, RecomputesUnderCondition, PreTrainedModel):
    """Base of a model around `vision_model` (None where features are stored) and `text_model`.

    The constructor of a subclass calls `_join` when both exist.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _join(self, vision: PreTrainedModel | None, text: PreTrainedModel, text_follows_mode: bool) -> None:
        """Set up both towers, and the standardising of pixels.

        Args:
            text_follows_mode: the pretrained modules of the text model follow `train` and `eval`; otherwise they stay
                in eval mode, as those of the vision tower do.
        """
        config = self.config
        self.vision_model, self.text_model = vision, text
        for tower, key in ((vision, "vision_config"), (text, "text_config")):
            if tower is None:
                continue
            # one object, so that later changes (attention implementation) reach both
            getattr(config, key)._attn_implementation = tower.config._attn_implementation
            tower.config = getattr(config, key)
        self.pixel_norm = Affine(config.pixel_mean, config.pixel_std, dim=1, scale=1 / 255)
        still = [] if vision is None else list(vision.modules())
        still += [] if text_follows_mode else list(text.modules())
        # The modules as pretrained, without adapters that come later; nn.Module does not register those in a tuple.
        object.__setattr__(self, "_still", (still,))

    def with_towers_in(self, dtype: torch.dtype) -> ComposedModel:
        """This model, its towers in the dtype in which loading gives them: those made from a configuration, as on the
        meta device, are float32."""
        for tower in (self.vision_model, self.text_model):
            for parameter in () if tower is None else tower.parameters():
                parameter.data = parameter.data.to(dtype)
        return self

    def train(self, mode: bool = True) -> ComposedModel:
        """Frozen towers stay in eval mode; adapters inside them and trained modules follow `mode`."""
        super().train(mode)
        for module in self._still[0]:
            # transformers recomputes a layer only if the layer itself is in training mode; its dropouts stay off
            module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def _through_vision_tower(self, pixel_values: Tensor, feature: str, with_tokens: bool) -> Tensor:
        """(I, m, d) features of pixels, uint8 or standardised already; see `tower_loading.vision_features`."""
        if not pixel_values.is_floating_point():
            pixel_values = self.pixel_norm(pixel_values)
        # a partitioned parameter keeps its dtype under ZeRO-3, but not its shape
        pixel_values = pixel_values.to(next(self.vision_model.parameters()).dtype)
        tuned = any(p.requires_grad for p in self.vision_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and tuned):
            return vision_features(self.vision_model, pixel_values, feature, self.config.vision_norm, with_tokens)


class HeadLinear(nn.Linear):
    """Linear whose weights start from N(0, 0.02) and biases from 0, initialised before ZeRO-3 partitions them."""

    std = 0.02

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@dataclass
class DualEncoderOutput(ModelOutput):
    """Output of a dual encoder.

    The similarity of text t and image i is `logit_scale * text_t . image_i + logit_bias`.

    Attributes:
        image_features: (I, p), at least float32, unit vectors unless asked otherwise; None without images.
        text_features: (T, p), likewise; None without texts.
        logit_scale: factor greater than 0, 1 / temperature.
        logit_bias: SigLIP's offset; None for CLIP.
    """

    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
