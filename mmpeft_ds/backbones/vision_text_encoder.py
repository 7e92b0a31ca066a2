"""Backbone: any ViT-like vision tower and any BERT- or RoBERTa-like text encoder, joined for classification.

The defaults are the RoBERTa + ViT wiring of the routing paper (arXiv 2403.09377; specs/routing.md 2.1).
"""

# T texts, I images, L text length, d width

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from mmpeft_ds.backbones import _towers
from mmpeft_ds.backbones._transform import SquareTransform
from mmpeft_ds.backbones._vision_text_model import Affine, VisionTextEncoder, VisionTextEncoderConfig
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput

# A checkpoint of a masked language model has no trained pooler: the paper's frozen pooler is a random projection in
# effect. A fixed seed makes it the same projection in every run, on every rank and when an adapter is loaded.
POOLER_SEED = 0


@dataclass
class Options:
    """Keys of the recipe's `backbone` section.

    Attributes:
        vision: hub name, local directory or packaged:NAME of a vit, deit, dinov2, clip or siglip vision tower.
        vision_layers: use the first n layers only, 0 = all.
        image_size: side of the square input in pixels, a multiple of the patch size.
        fit: `stretch` the whole image to the square, or `crop` its centre.
        resample: `bilinear`, `bicubic`, or `auto` = as the checkpoint was trained.
        vision_feature: the vector of an image: `pooler` (what the family pools), `cls`, or the `mean` of the patches.
        vision_norm: apply the tower's LayerNorm after its last layer; false needs `cls` or `mean`.
        feature_norm: `zscore` standardises each dimension with the statistics stored with the shards.
        text: hub name, local directory or packaged:NAME of a bert or roberta encoder.
        max_text_length: tokens of a text with its special tokens, without the prefix; longer texts are cut.
        prefix: what goes before the text: `none`, the `pooled` vector, or all `tokens` of an image.
        condition: what adapters route on: `none`, the `pooled` vector (mean over the images of a sample), or `tokens`.
        embed_twice: send prefix and embedded text through the embedding module again (positions, type, LayerNorm).
        head_input: `pooler` (frozen) of the first position, the `raw` first position, or the `mean` of all.
        head_layers: 1 (dropout, Linear) or 2 (Linear, LayerNorm, GELU, dropout, Linear).
        head_multiple: inner width of the head as a multiple of the text width.
        head_dropout: 0 in the paper; one-layer heads there use the encoder's hidden dropout.
        num_labels: size of the head, 0 = from the label list of the data.
    """

    vision: str = "google/vit-base-patch16-224-in21k"
    vision_layers: int = 0
    image_size: int = 224
    fit: Literal["stretch", "crop"] = "stretch"
    resample: Literal["auto", "bilinear", "bicubic"] = "auto"
    vision_feature: Literal["pooler", "cls", "mean"] = "pooler"
    vision_norm: bool = True
    feature_norm: Literal["none", "zscore"] = "none"
    text: str = "roberta-base"
    max_text_length: int = 19
    prefix: Literal["none", "pooled", "tokens"] = "pooled"
    condition: Literal["none", "pooled", "tokens"] = "pooled"
    embed_twice: bool = True
    head_input: Literal["pooler", "raw", "mean"] = "pooler"
    head_layers: Literal[1, 2] = 2
    head_multiple: int = 2
    head_dropout: float = 0.0
    num_labels: int = 0


class VisionTextEncoderBackbone:
    """The family as recipes use it.

    Attributes:
        attention: implementation for both towers, `auto` chooses by device; the engine sets it before `build`.
        dtype: of the frozen base; the engine sets it before `build`.
        train_dropout: leave the text encoder's dropout on in training; the engine sets it before `build`.
    """

    Options = Options
    modalities = ("image", "text")

    def __init__(self, options: Options, labels: list[str] | None):
        self.options = options
        self.labels = labels
        self.attention = "auto"
        self.dtype = torch.float32
        self.train_dropout = False
        self._statistics: tuple[list[float], list[float]] | None = None

    def check(self) -> None:
        """Refuse what cannot work, from configurations only."""
        o = self.options
        vision, text = self._vision_config, self._text_config
        if (o.prefix != "none" or o.condition != "none") and vision.hidden_size != text.hidden_size:
            raise BadInput(
                f"backbone: prefix and condition need towers of equal width, but vision {o.vision!r} is "
                f"{vision.hidden_size} wide and text {o.text!r} {text.hidden_size}. Choose another pair, or set "
                "prefix: none and condition: none."
            )
        layers = _towers.load_config(o.vision, "backbone.vision", "vision").num_hidden_layers
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
        if o.vision_feature == "cls" and not _towers.VISION[vision.model_type].summary_tokens:
            raise BadInput(f"backbone.vision_feature: {o.vision!r} has no class token. Use pooler or mean.")
        if o.vision_feature == "pooler" and vision.model_type == "siglip_vision_model" and not vision.vision_use_head:
            raise BadInput(f"backbone.vision_feature: {o.vision!r} has no pooling head. Use mean.")
        tokens = (o.image_size // patch) ** 2 + _towers.VISION[vision.model_type].summary_tokens
        room = text.max_position_embeddings - (0 if text.model_type == "bert" else text.pad_token_id + 1)
        used = o.max_text_length + {"none": 0, "pooled": 1, "tokens": tokens}[o.prefix]
        if o.max_text_length < 3 or used > room:
            raise BadInput(
                f"backbone.max_text_length: {o.max_text_length} with prefix {o.prefix} needs {used} positions; "
                f"{o.text!r} has {room} (at least 3 are needed for one word)."
            )
        if o.head_layers not in (1, 2) or o.head_multiple < 1 or not 0 <= o.head_dropout < 1:
            raise BadInput("backbone.head_layers is 1 or 2, head_multiple at least 1, head_dropout in [0, 1).")
        if self._num_labels < 1:
            raise BadInput(
                "backbone.num_labels: 0, and the data set has no label list. Say how many answers the head has."
            )
        if o.num_labels and self.labels and o.num_labels < len(self.labels):
            raise BadInput(
                f"backbone.num_labels: {o.num_labels}, but the data has {len(self.labels)} labels. Use 0 or more."
            )

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The model with frozen pretrained towers and a fresh head."""
        config = self._config(on_meta)
        if on_meta:
            with torch.device("meta"):
                model = VisionTextEncoder(config)
        else:
            vision = self._load_vision(config.vision_config)
            text = self._load_text(config)
            with torch.random.fork_rng():
                # The same head on every rank and at every ZeRO stage, however many draws loading the towers took.
                torch.manual_seed(torch.initial_seed())
                model = VisionTextEncoder(config, vision, text)
        model.vision_model.requires_grad_(False)
        model.text_model.requires_grad_(False)
        return model.train()

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Resize to the tower's input; no augmentation, since answers may depend on colour, side and place."""
        o = self.options
        resample = (
            o.resample
            if o.resample != "auto"
            else {2: "bilinear", 3: "bicubic"}.get(self._pixels["resample"], "bicubic")
        )
        return SquareTransform(o.image_size, o.fit, resample)

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """Stack transformed images, or stored features of shape (d,) or (m, d)."""
        stacked = torch.stack([torch.as_tensor(image) for image in images])
        return {"pixel_values" if stacked.dim() == 4 else "image_features": stacked}

    def collate_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and mask, as long as the longest text of this batch."""
        out = self._tokenizer(
            texts, truncation=True, max_length=self.options.max_text_length, padding="longest", return_tensors="pt"
        )
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def dummy(self, modality: str) -> Any:
        """A black image of 8x8 pixels, or the text `a`."""
        return {"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "text": "a"}[modality]

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments of VisionTextEncoder."""
        return {
            **batch.texts,
            **batch.images,
            "image_owner": batch.image_owner,
            "text_owner": batch.text_owner,
            "num_slots": len(batch.sample_id),
        }

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """The vision tower and the text embeddings, as far as nothing below them trains."""
        at, base = next((n, m) for n, m in model.named_modules() if isinstance(m, VisionTextEncoder))
        dot = f"{at}." if at else ""
        frozen = []
        for path, module in (
            ("vision_model", base.vision_model),
            ("text_model.embeddings", base.text_model.embeddings),
        ):
            if any(p.requires_grad for p in module.parameters()):
                break
            frozen.append(dot + path)
        return frozen

    @property
    def condition_width(self) -> int | None:
        """Width of the vectors that adapters may route on, None without a condition."""
        return None if self.options.condition == "none" else self._vision_config.hidden_size

    @property
    def wants_statistics(self) -> bool:
        """`use_statistics` must be called before `build`."""
        return self.options.feature_norm == "zscore"

    def use_statistics(self, statistics: dict[str, Any]) -> None:
        """Mean and standard deviation of the training images' feature, each a list of d numbers.

        Raises:
            BadInput: if they are of another width than the tower.
        """
        mean, std = list(statistics["mean"]), list(statistics["std"])
        width = self._vision_config.hidden_size
        if len(mean) != width or len(std) != width:
            raise BadInput(
                f"backbone.feature_norm: statistics of width {len(mean)}, but {self.options.vision!r} is {width} "
                "wide. Run data_prep/feature_stats.py for this backbone."
            )
        # A dimension that never varied carries nothing: leave its scale alone instead of dividing by zero.
        self._statistics = (mean, [s if s > 1e-6 else 1.0 for s in std])

    def statistics_key(self) -> str:
        """Which statistics fit: hash of the vision weights, the image transform and the choice of feature."""
        o = self.options
        choice = {
            "weights": _towers.weights_hash(o.vision, "backbone.vision"),
            "layers": self._vision_config.num_hidden_layers,
            "feature": o.vision_feature,
            "norm": o.vision_norm,
            "transform": asdict(self.image_transform(False)),
            "mean": self._pixels["mean"],
            "std": self._pixels["std"],
        }
        return hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]

    def build_vision(self) -> Callable[[dict[str, Tensor]], Tensor]:
        """Function from `collate_images` output to the (I, d) vectors of the images, not yet standardised."""
        config = self._vision_config
        tower = self._load_vision(config).eval()
        return functools.partial(
            _image_vectors, tower, Affine(self._pixels["mean"], self._pixels["std"], 1, 1 / 255), self.options
        )

    # configurations and parts

    @functools.cached_property
    def _vision_config(self) -> PretrainedConfig:
        config = _towers.load_config(self.options.vision, "backbone.vision", "vision")
        if self.options.vision_layers:
            config = _towers.first_layers(config, self.options.vision_layers)
        if self.options.vision_feature != "pooler" and hasattr(config, "vision_use_head"):
            config.vision_use_head = False
        return config

    @functools.cached_property
    def _text_config(self) -> PretrainedConfig:
        return _towers.load_config(self.options.text, "backbone.text", "text")

    @functools.cached_property
    def _pixels(self) -> dict[str, Any]:
        return _towers.image_processor(self.options.vision, self._vision_config, "backbone.vision")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        where = "backbone.text"
        try:
            return AutoTokenizer.from_pretrained(_towers.locate(self.options.text, where), use_fast=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise BadInput(f"{where}: cannot load the tokenizer of {self.options.text!r} ({reason}).") from error

    @property
    def _num_labels(self) -> int:
        return self.options.num_labels or len(self.labels or [])

    def _config(self, on_meta: bool) -> VisionTextEncoderConfig:
        o = self.options
        if self.wants_statistics and self._statistics is None and not on_meta:
            raise BadInput(
                "backbone.feature_norm: zscore, but no statistics. Run data_prep/feature_stats.py on the data first."
            )
        width = self._vision_config.hidden_size
        mean, std = self._statistics or ([0.0] * width, [1.0] * width)
        names = {i: str(label) for i, label in enumerate(self.labels)} if self.labels else None
        if names is not None and len(names) < self._num_labels:
            names.update({i: f"LABEL_{i}" for i in range(len(names), self._num_labels)})
        labels = (
            {"id2label": names, "label2id": {n: i for i, n in names.items()}}
            if names
            else {"num_labels": self._num_labels}
        )
        attention = _towers.choose_attention(self.attention, self.dtype)
        config = VisionTextEncoderConfig(
            vision_config=copy.deepcopy(self._vision_config),
            text_config=copy.deepcopy(self._text_config),
            vision_feature=o.vision_feature,
            vision_norm=o.vision_norm,
            prefix=o.prefix,
            condition=o.condition,
            embed_twice=o.embed_twice,
            head_input=o.head_input,
            head_layers=o.head_layers,
            head_multiple=o.head_multiple,
            head_dropout=o.head_dropout,
            feature_norm=o.feature_norm,
            feature_mean=mean if self.wants_statistics else None,
            feature_std=std if self.wants_statistics else None,
            pixel_mean=self._pixels["mean"],
            pixel_std=self._pixels["std"],
            train_dropout=self.train_dropout,
            **labels,
        )
        config._attn_implementation = attention
        return config

    def _load_vision(self, config: PretrainedConfig) -> PreTrainedModel:
        extra = _towers.pooler_argument(config, "vision", self.options.vision_feature == "pooler")
        return _towers.load_tower(self.options.vision, "backbone.vision", config, **self._loading(), **extra)

    def _load_text(self, config: VisionTextEncoderConfig) -> PreTrainedModel:
        extra = _towers.pooler_argument(config.text_config, "text", self.options.head_input == "pooler")
        with torch.random.fork_rng():
            torch.manual_seed(POOLER_SEED)
            return _towers.load_tower(
                self.options.text,
                "backbone.text",
                config.text_config,
                may_miss=("pooler.",),
                **self._loading(),
                **extra,
            )

    def _loading(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "attn_implementation": _towers.choose_attention(self.attention, self.dtype)}


ENTRY = VisionTextEncoderBackbone


@torch.no_grad()
def _image_vectors(tower: PreTrainedModel, pixel_norm: Affine, options: Options, images: dict[str, Tensor]) -> Tensor:
    reference = next(tower.parameters())
    pixels = pixel_norm(images["pixel_values"].to(reference.device)).to(reference.dtype)
    return _towers.vision_features(tower, pixels, options.vision_feature, options.vision_norm, with_tokens=False)[
        :, 0
    ].float()
