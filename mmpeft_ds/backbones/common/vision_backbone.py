"""The image side of backbones with a vision tower and a text tower: checks, transform, statistics, loading."""

# I images, d width

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mmpeft_ds.backbones.base import BackboneBase, ImagePrefix
from mmpeft_ds.backbones.common import quantised, stock, tower_loading
from mmpeft_ds.backbones.common.affine import Affine
from mmpeft_ds.backbones.common.texts import TextIds
from mmpeft_ds.backbones.common.transform import SquareTransform
from mmpeft_ds.backbones.common.vision_options import VisionOptions
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.base import base_model


class VisionBackbone(BackboneBase):
    """Base of such backbones; a subclass has `_text_config`, and options that extend `VisionOptions` by `text`."""

    def __init__(self, options: Any, labels: list[str] | None):
        super().__init__(options, labels)
        self._statistics: tuple[list[float], list[float]] | None = None

    def _check_vision(self) -> None:
        """Refuse options of the image side that cannot work, from configurations only."""
        o = self.options
        vision, text = self._vision_config, self._text_config
        if (o.prefix != "none" or o.condition != "none") and self._vector_width != text.hidden_size:
            raise BadInput(
                f"backbone: prefix and condition need towers of equal width, but vision {o.vision!r} is "
                f"{vision.hidden_size} wide and text {o.text!r} {text.hidden_size}. {self._other_widths}"
            )
        layers = tower_loading.load_config(o.vision, "backbone.vision", "vision").num_hidden_layers
        if not 0 <= o.vision_layers <= layers:
            raise BadInput(
                f"backbone.vision_layers: {o.vision_layers}, but {o.vision!r} has {layers} layers. Use 0 for all."
            )
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        if o.image_size <= 0 or o.image_size % patch:
            raise BadInput(f"backbone.image_size: {o.image_size} is no positive multiple of the patch size {patch}.")
        if o.vision_feature == "pooler" and not o.vision_norm:
            raise BadInput(
                "backbone.vision_norm: false, but a pooler reads the normed tokens. Set vision_feature: cls or mean."
            )
        if o.vision_feature == "cls" and not tower_loading.VISION[vision.model_type].summary_tokens:
            raise BadInput(f"backbone.vision_feature: {o.vision!r} has no class token. Use pooler or mean.")
        if o.vision_feature == "pooler" and vision.model_type == "siglip_vision_model" and not vision.vision_use_head:
            raise BadInput(f"backbone.vision_feature: {o.vision!r} has no pooling head. Use mean.")

    @property
    def _prefix_length(self) -> int:
        """Positions that one image takes before the text."""
        patch = self._vision_config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        tokens = (self.options.image_size // patch) ** 2
        tokens += tower_loading.VISION[self._vision_config.model_type].summary_tokens
        return {"none": 0, "pooled": 1, "tokens": tokens}[self.options.prefix]

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Resize to the tower's input; no augmentation, since answers may depend on colour, side and place."""
        return self._square()

    def _square(self) -> SquareTransform:
        o = self.options
        return SquareTransform(o.image_size, o.fit, tower_loading.interpolation(o.resample, self._pixels))

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """Stack transformed images, or stored features of shape (d,) or (m, d)."""
        stacked = torch.stack([torch.as_tensor(image) for image in images])
        return {"pixel_values" if stacked.dim() == 4 else "image_features": stacked}

    def image_prefix(self, model: Any) -> ImagePrefix | None:
        """The vision tower with the choice of feature; what standardises features stands after it."""
        base = base_model(model)
        if base.vision_model is None or any(p.requires_grad for p in base.vision_model.parameters()):
            return None
        config = base.config
        choice = {"feature": config.vision_feature, "norm": config.vision_norm, "tokens": config.with_tokens}
        return ImagePrefix(("vision_model", "pixel_norm"), choice | {"config": stock.arithmetic(self._vision_config)})

    @torch.no_grad()
    def image_values(self, model: Any, images: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """(m, d) features of each image, as the tower gives them."""
        return [{"image_features": x} for x in base_model(model).encode_images(images["pixel_values"])]

    @property
    def condition_width(self) -> int | None:
        """Width of the vectors that adapters may route on, None without a condition."""
        return None if self.options.condition == "none" else self._vector_width

    @property
    def statistics_width(self) -> int:
        """Width of the vision tower."""
        return self._vision_config.hidden_size

    @property
    def wants_statistics(self) -> bool:
        """Under `feature_norm: zscore`."""
        return self.options.feature_norm == "zscore"

    def use_statistics(self, statistics: dict[str, Any]) -> None:
        """Mean and standard deviation of the training images' feature, each a list of d numbers.

        Raises:
            BadInput: if they are of another width than the tower.
        """
        mean, std = list(statistics["mean"]), list(statistics["std"])
        width = self.statistics_width
        if len(mean) != width or len(std) != width:
            raise BadInput(
                f"backbone.feature_norm: statistics of width {len(mean)}, but {self.options.vision!r} is {width} "
                "wide. Run data_prep/feature_stats.py for this backbone."
            )
        # A dimension that never varied keeps its scale, which avoids a division by zero.
        self._statistics = (mean, [s if s > 1e-6 else 1.0 for s in std])

    def statistics_key(self) -> str:
        """Hash of the vision tower, the image transform and the choice of feature: the key of fitting statistics."""
        return stock.tower_key(self._vision_choice(), self._vision_config)

    def _vision_choice(self) -> dict[str, Any]:
        """Everything that the vector of an image depends on."""
        o = self.options
        return {
            "weights": tower_loading.weights_hash(o.vision, "backbone.vision"),
            "layers": self._vision_config.num_hidden_layers,
            "feature": o.vision_feature,
            "norm": o.vision_norm,
            "transform": asdict(self._square()),
            "mean": self._pixels["mean"],
            "std": self._pixels["std"],
            **({} if o.quantise == "none" else {"quantise": o.quantise}),  # without it as earlier versions wrote it
        }

    def build_vision(self) -> Callable[[dict[str, Tensor]], Tensor]:
        """Function from `collate_images` output to the (I, d) vectors of the images, not yet standardised."""
        config = self._vision_config
        tower = self._quantised(self._load_vision(config)).eval()
        return functools.partial(
            _image_vectors, tower, Affine(self._pixels["mean"], self._pixels["std"], 1, 1 / 255), self.options
        )

    def statistics_rows(self, images: dict[str, Tensor]) -> Tensor:
        """The pooled vectors."""
        return images["image_features"][:, 0].float()

    # configurations and parts

    # How to mend two towers of different width; the end of an error message.
    _other_widths = "Choose another pair, or set prefix: none and condition: none."

    @property
    def _vector_width(self) -> int:
        """Width of the image vectors that become prefix and condition."""
        return self._vision_config.hidden_size

    @functools.cached_property
    def _vision_config(self) -> PretrainedConfig:
        config = tower_loading.load_config(self.options.vision, "backbone.vision", "vision")
        if self.options.vision_layers:
            config = tower_loading.first_layers(config, self.options.vision_layers)
        if self.options.vision_feature != "pooler" and hasattr(config, "vision_use_head"):
            config.vision_use_head = False
        return config

    @functools.cached_property
    def _pixels(self) -> dict[str, Any]:
        return tower_loading.image_processor(self.options.vision, self._vision_config, "backbone.vision")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return stock.read_tokenizer(self.options.text, "backbone.text")

    @functools.cached_property
    def _texts(self) -> TextIds:
        return TextIds(self._tokenizer)

    def _side_config(self, on_meta: bool) -> dict[str, Any]:
        """Fields of `VisionSideConfig`. Raises BadInput where statistics are needed and missing."""
        o = self.options
        if self.wants_statistics and self._statistics is None and not on_meta:
            raise BadInput(
                "backbone.feature_norm: zscore, but no statistics. Run data_prep/feature_stats.py on the data first."
            )
        width = self._vision_config.hidden_size
        mean, std = self._statistics or ([0.0] * width, [1.0] * width)
        return {
            "vision_config": copy.deepcopy(self._vision_config),
            "text_config": copy.deepcopy(self._text_config),
            "vision_feature": o.vision_feature,
            "vision_norm": o.vision_norm,
            "prefix": o.prefix,
            "condition": o.condition,
            "feature_norm": o.feature_norm,
            "feature_mean": mean if self.wants_statistics else None,
            "feature_std": std if self.wants_statistics else None,
            "pixel_mean": self._pixels["mean"],
            "pixel_std": self._pixels["std"],
            "train_dropout": self.train_dropout,
        }

    def _load_vision(self, config: PretrainedConfig) -> PreTrainedModel:
        pooler = self.options.vision_feature == "pooler"
        if self.options.random_weights:
            return self._random_tower(config, "vision", pooler)
        extra = tower_loading.pooler_argument(config, "vision", pooler)
        return tower_loading.load_tower(self.options.vision, "backbone.vision", config, **self._loading(), **extra)

    def _random_tower(self, config: PretrainedConfig, kind: str, pooler: bool) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(stock.RANDOM_SEED)
            return tower_loading.empty_tower(config, kind, pooler).to(self.dtype)

    def _quantised(self, model: PreTrainedModel) -> PreTrainedModel:
        """The frozen model with the linear layers of its towers in the form of the option `quantise`."""
        return quantised.quantise(model, self.options.quantise, self.dtype)

    def _loading(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "quantise": self.options.quantise,
            "attn_implementation": tower_loading.choose_attention(self.attention, self.dtype),
            **tower_loading.placed(self.device),
        }


@torch.no_grad()
def _image_vectors(
    tower: PreTrainedModel, pixel_norm: Affine, options: VisionOptions, images: dict[str, Tensor]
) -> Tensor:
    reference = next(tower.parameters())
    pixels = pixel_norm(images["pixel_values"].to(reference.device)).to(reference.dtype)
    return tower_loading.vision_features(
        tower, pixels, options.vision_feature, options.vision_norm, with_tokens=False
    )[:, 0].float()
