"""Backbone: CLIP or SigLIP as a dual encoder, for retrieval and for classification by class texts.

The model is transformers' own CLIPModel or SiglipModel (same parameter names) whose forward takes the packed batch.
"""

# I images, T texts, L text length, p width of the shared space

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel, PretrainedConfig, PreTrainedModel, SiglipModel
from transformers.utils import ModelOutput

from mmpeft_ds.backbones.clip.options import Options
from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.transform import SquareTransform
from mmpeft_ds.backbones.common.vision_model import Affine
from mmpeft_ds.data.batch import PackedBatch, Prompted
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.condition import Condition, conditioned, current

WHERE = "backbone.model"
STOCK = {"clip": CLIPModel, "siglip": SiglipModel}


@dataclass
class DualEncoderOutput(ModelOutput):
    """What the model returns; the similarity of text t and image i is `logit_scale * text_t . image_i + logit_bias`.

    Attributes:
        image_features: (I, p), at least float32, unit vectors unless asked otherwise; None without images.
        text_features: (T, p), likewise; None without texts.
        logit_scale: the checkpoint's (frozen) factor, a number greater than 0; 1 / temperature.
        logit_bias: SigLIP's offset; None for CLIP.
    """

    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None


class DualEncoder(stock.Publishing):
    """Mixin over CLIPModel or SiglipModel: either side may be absent, and texts know whose images they go with."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """CLIP's temperature has no dimensions, which ZeRO-3 cannot partition: a buffer, as it stays frozen."""
        if param is not None and param.dim() == 0:
            self.register_buffer(name, param.data)
        else:
            super().register_parameter(name, param)

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
            pixel_values: (I, 3, H, W), normalised.
            image_owner, text_owner: slot of each image and text; None: image i and text i belong to slot i. Only a
                condition needs them.
            num_slots: number of slots; None: as many as needed.
            unit: give unit vectors; otherwise features as they leave the projections.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
        """
        raw = texts = None
        if pixel_values is not None and len(pixel_values):
            parameter = next(self.vision_model.parameters())
            other_size = pixel_values.shape[-1] != self.config.vision_config.image_size
            raw = self.get_image_features(
                pixel_values.to(parameter.dtype), interpolate_pos_encoding=other_size
            ).pooler_output
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
            logit_bias=getattr(self, "logit_bias", None),
        )

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
            raw = torch.zeros(0, _shared_width(self.config), device=device, dtype=self.dtype)
        if image_owner is None:
            image_owner = torch.arange(len(raw), device=device)
        if text_owner is None:
            text_owner = torch.arange(texts, device=device)
        slots = max(len(raw), texts) if num_slots is None else num_slots
        return Condition(stock.mean_per_text(raw, image_owner, text_owner, slots).unsqueeze(1), own_mask=own)


class ClipBackbone:
    """The family as recipes use it; attributes as in `backbones/base.py`."""

    Options = Options
    modalities = ("image", "text")

    def __init__(self, options: Options, labels: list[str] | None):
        self.options = options
        self.labels = labels
        self.attention = "auto"
        self.dtype = torch.float32
        self.train_dropout = False

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
        model_class = stock.publishing(DualEncoder, STOCK[self._config.model_type])
        o, config = self.options, copy.deepcopy(self._config)
        config.condition = o.condition  # saved with the model
        return stock.load(model_class, o.model, WHERE, config, self.dtype, self.attention, o.random_weights, on_meta)

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Resize to the tower's input; no augmentation."""
        o = self.options
        resample = {2: "bilinear", 3: "bicubic"}.get(self._pixels["resample"], "bicubic")
        return SquareTransform(
            o.image_size or self._config.vision_config.image_size,
            o.fit if o.fit != "auto" else "stretch" if self._siglip else "crop",
            o.resample if o.resample != "auto" else resample,
        )

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """Stack transformed images, uint8."""
        return {"pixel_values": torch.stack([torch.as_tensor(image) for image in images])}

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """Token ids and mask, as long as the longest text of this batch; SigLIP's padded to its full length."""
        plain = [f"{t.prompt} {t.target}".strip() if isinstance(t, Prompted) else t for t in texts]
        length = self.options.max_text_length or self._config.text_config.max_position_embeddings
        padding = "max_length" if self._siglip else "longest"
        out = self._tokenizer(plain, truncation=True, max_length=length, padding=padding, return_tensors="pt")
        # SigLIP attends to its padding, as it was trained
        names = ("input_ids",) if self._siglip else ("input_ids", "attention_mask")
        return {name: out[name] for name in names}

    def dummy(self, modality: str) -> Any:
        """A black image of 8x8 pixels, or the text `a`."""
        return {"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "text": "a"}[modality]

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments; pixels are normalised here, on the device of the batch."""
        images = dict(batch.images)
        if "pixel_values" in images and not images["pixel_values"].is_floating_point():
            images["pixel_values"] = self._normalise(images["pixel_values"])
        owners = {"image_owner": batch.image_owner, "text_owner": batch.text_owner}
        return {**batch.texts, **images, **owners, "num_slots": len(batch.sample_id)}

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """Each tower without a trainable, or its embeddings."""
        return stock.untrained(model, {"vision_model": "embeddings", "text_model": "embeddings"})

    # as encoders (`backbones.base.Embedding`)

    @property
    def feature_widths(self) -> tuple[int, int]:
        """The shared space is as wide for images as for texts."""
        return (_shared_width(self._config),) * 2

    def embed(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor | None, Tensor | None]:
        """(I, p) and (T, p) features of the batch behind the projections, not normalised; None for what it lacks."""
        out = model(**self.inputs(batch), unit=False)
        return out.image_features, out.text_features

    def embed_texts(self, model: nn.Module, texts: list[str]) -> Tensor:
        """(n, p), on the device of the model, without gradient."""
        return stock.embed_texts(self, model, texts)

    def logit_scale_of(self, model: nn.Module) -> float:
        """The checkpoint's 1 / temperature."""
        return float(model.logit_scale.double().exp())

    def towers_key(self) -> str:
        """Hash of the weights, the image transform and the length of texts: what features depend on."""
        o = self.options
        weights = "random" if o.random_weights else tower_loading.weights_hash(o.model, WHERE)
        transform = dataclasses.asdict(self.image_transform(False))
        pixels = {key: self._pixels[key] for key in ("mean", "std")}
        return stock.short_hash([weights, transform, pixels, o.max_text_length])

    @property
    def condition_width(self) -> int | None:
        """Width of the shared space, None without a condition."""
        return None if self.options.condition == "none" else _shared_width(self._config)

    @functools.cached_property
    def _config(self) -> PretrainedConfig:
        return stock.read_config(self.options.model, WHERE, tuple(STOCK))

    @property
    def _siglip(self) -> bool:
        return self._config.model_type == "siglip"

    @functools.cached_property
    def _pixels(self) -> dict[str, Any]:
        return tower_loading.image_processor(self.options.model, self._config.vision_config, WHERE)

    @functools.cached_property
    def _normalise(self) -> Affine:
        return Affine(self._pixels["mean"], self._pixels["std"], dim=1, scale=1 / 255)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return stock.read_tokenizer(self.options.model, WHERE)


ENTRY = ClipBackbone


def _shared_width(config: PretrainedConfig) -> int:
    """SigLIP has no projection beside the heads of its towers."""
    return config.projection_dim if config.model_type == "clip" else config.text_config.projection_size


def _unit(x: Tensor) -> Tensor:
    return normalize(at_least_float32(x), dim=-1)
