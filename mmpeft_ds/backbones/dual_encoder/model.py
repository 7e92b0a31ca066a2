"""The composed dual encoder: a vision tower and a text encoder side by side, each projected into a shared space.

transformers' VisionTextDualEncoderModel pools both sides as CLIP does; here the feature of each side is an option, as
is the projection.
"""

# I images, T texts, L text length, Dv and Dt width of the towers, p width of the shared space

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, PreTrainedModel

from mmpeft_ds.backbones.common.composed import DualEncoderOutput
from mmpeft_ds.backbones.common.tower_loading import empty_tower
from mmpeft_ds.backbones.common.vision_model import VisionSide, VisionSideConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.condition import Condition, conditioned, current

# CLIP's limit; with a larger factor a few pairs dominate the loss.
LARGEST_SCALE = 100.0


class DualEncoderConfig(VisionSideConfig):
    """Both towers and how their features meet; `backbones/dual_encoder/options.py` explains the fields."""

    model_type = "mmpeft_dual_encoder"

    prefix: str = "none"
    condition: str = "none"
    images: str = "live"
    image_size: int = 224
    fit: str = "stretch"
    resample: str = "bicubic"
    text_feature: str = "mean"
    max_text_length: int = 64
    projection: str = "none"
    width: int = 256
    projection_dropout: float = 0.0
    logit_scale: float = 1 / 0.07
    train_projection: bool = True
    train_logit_scale: bool = False

    @property
    def feature_widths(self) -> tuple[int, int]:
        """(Dv, Dt), or (p, p) after projections."""
        if self.projection == "none":
            return self.vision_config.hidden_size, self.text_config.hidden_size
        return self.width, self.width


class Projection(nn.Module):
    """(n, d) features of a tower into the shared space, (n, p), in at least float32.

    `linear`: a matrix without bias, as CLIP's; `mlp`: LayerNorm, Linear, GELU, dropout, Linear.
    """

    def __init__(self, config: DualEncoderConfig, width: int):
        super().__init__()
        self.deep = config.projection == "mlp"
        if self.deep:
            self.norm = nn.LayerNorm(width)
            self.dense = ProjectionLinear(width, config.width)
            self.dropout = nn.Dropout(config.projection_dropout)
        self.out = ProjectionLinear(config.width if self.deep else width, config.width, bias=self.deep)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.out.weight.dtype)
        if self.deep:
            x = self.dropout(nn.functional.gelu(self.dense(self.norm(x))))
        return at_least_float32(self.out(x))


class ProjectionLinear(nn.Linear):
    """Linear that at first keeps the norm of its input on average; initialised before ZeRO-3 partitions it."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LogitScale(nn.Module):
    """The factor of the cosines as its logarithm, shape (1,): ZeRO-3 cannot partition a tensor without dimensions.

    Args:
        value: the initial factor, 1 / temperature.
        trained: make it a parameter; else it is a buffer.
    """

    def __init__(self, value: float, trained: bool):
        super().__init__()
        self.value = value
        log_scale = torch.full((1,), math.log(value))
        if trained:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(self.value))

    def forward(self, like: Tensor | None = None) -> Tensor:
        """The factor, shape (1,), at least float32 and at most 100; above that its gradient can still lower it.

        Args:
            like: ignored; peft's wrapper of a trained module needs an argument to pass on.
        """
        log_scale = at_least_float32(self.log_scale)
        excess = (log_scale - math.log(LARGEST_SCALE)).clamp(min=0).detach()
        return (log_scale - excess).exp()


class DualEncoder(VisionSide):
    """Vision tower, text encoder, projections. Build from a configuration, or from loaded towers.

    With `images: stored` there is no vision tower: its features take the place of pixels.

    Attributes:
        head_modules: those of the projections and the logit scale that the configuration trains.
    """

    config_class = DualEncoderConfig
    _keep_in_fp32_modules_strict = ["logit_scale"]

    def __init__(
        self,
        config: DualEncoderConfig,
        vision: PreTrainedModel | None = None,
        text: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if vision is None and config.images == "live":
            vision = empty_tower(config.vision_config, "vision", config.vision_feature == "pooler")
        text = text or empty_tower(config.text_config, "text", config.text_feature == "pooler")
        self._join_towers(vision, text)
        projected = config.projection != "none"
        self.image_projection = Projection(config, config.vision_config.hidden_size) if projected else None
        self.text_projection = Projection(config, config.text_config.hidden_size) if projected else None
        self.logit_scale = LogitScale(config.logit_scale, config.train_logit_scale)
        self.head_modules = ("image_projection", "text_projection") if projected and config.train_projection else ()
        self.head_modules += ("logit_scale",) if config.train_logit_scale else ()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ProjectionLinear | LogitScale):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
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
            pixel_values: (I, 3, H, W), uint8 (normalised here) or floating point (normalised already).
            image_features: (I, Dv) of the vision tower, in place of pixels.
            image_owner, text_owner, num_slots: accepted as by every backbone; no feature depends on them.
            unit: give unit vectors, which can be compared; otherwise features as they are.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.

        Raises:
            BadInput: if unit vectors of both sides are wanted, and are not equally wide.
        """
        images = texts = None
        if pixel_values is not None or image_features is not None:
            images = self._images(pixel_values, image_features)
        if input_ids is not None and len(input_ids):
            texts = self._texts(input_ids, attention_mask)
        if unit and images is not None and texts is not None and images.shape[1] != texts.shape[1]:
            raise BadInput(
                f"backbone.projection: none, but image features are {images.shape[1]} wide and text features "
                f"{texts.shape[1]}, so they cannot be compared. Use projection: linear or mlp."
            )
        if unit:
            images, texts = (None if x is None else normalize(x, dim=-1) for x in (images, texts))
        any_features = images if images is not None else texts
        return DualEncoderOutput(
            image_features=images, text_features=texts, logit_scale=self.logit_scale(any_features)
        )

    def _images(self, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor | None:
        if image_features is None and self.config.images == "stored" and len(pixel_values):
            raise BadInput(
                "backbone.images: stored, but the data has pixels. Give feature shards, or set images: live."
            )
        features = self.encode_images(pixel_values, image_features)
        if features is None or not len(features):
            return None
        features = at_least_float32(features[:, 0])
        return features if self.image_projection is None else self.image_projection(features)

    def _texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        own = None if attention_mask is None else attention_mask.bool()
        with conditioned(current() or Condition(own_mask=own)):
            out = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        if self.config.text_feature == "pooler":
            features = out.pooler_output
        elif self.config.text_feature == "cls":
            features = out.last_hidden_state[:, 0]
        else:
            keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            keep = keep.unsqueeze(2).to(out.last_hidden_state.dtype)
            features = (out.last_hidden_state * keep).sum(1) / keep.sum(1)
        features = at_least_float32(features)
        return features if self.text_projection is None else self.text_projection(features)


AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoder, exist_ok=True)
