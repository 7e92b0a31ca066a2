"""Backbone: CLIP grid features and BART, which generates the answer; several tasks differ by their prompts.

The defaults are the frame of VL-Adapter that the routing paper uses (arXiv 2403.09377; specs/routing.md 2.3).
"""

# T texts, I images, L and S text lengths, n grid features of an image, F their width

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartForConditionalGeneration, PretrainedConfig, PreTrainedModel

from mmpeft_ds.backbones.base import BackboneBase, ImagePrefix
from mmpeft_ds.backbones.clip_bart.model import ClipBart, ClipBartConfig, ClipBartOutput
from mmpeft_ds.backbones.clip_bart.options import Options
from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.generation import in_step, one_of
from mmpeft_ds.backbones.common.spelling import Spelling
from mmpeft_ds.backbones.common.texts import TextIds, collated, pairs
from mmpeft_ds.backbones.common.transform import SquareTransform
from mmpeft_ds.data.batch import PackedBatch, Prompted
from mmpeft_ds.data.formats import REGION_COUNTS
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.data.transform import ImageTransform
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.sites.base import base_model

# Seed of the frozen rows that name places in the grid: they are the same in every run and wherever an adapter loads.
ORDER_SEED = 0


@dataclass(frozen=True)
class StoredGrid(ImageTransform):
    """Takes stored grid features, (n, width) with n a square number, in place of images.

    Attributes:
        most: places of a grid that have a name, 0 = any number, since they are pooled.
    """

    width: int
    most: int = 0

    takes_features = True

    def __call__(self, features: Tensor, generator: Any = None) -> Tensor:
        """The features as they are. Raises BadSample."""
        n = features.shape[0] if features.dim() == 2 else -1
        if not features.is_floating_point() or n < 1 or round(n**0.5) ** 2 != n or features.shape[1] != self.width:
            raise BadSample("features", f"{features.dtype} of shape {tuple(features.shape)}, not (n^2, {self.width})")
        if 0 < self.most < n:
            raise BadSample("features", f"{n} places, but backbone.order_tokens is {self.most}")
        return features


class ClipBartBackbone(BackboneBase):
    """CLIP grid features and BART as recipes use them."""

    Options = Options
    generates = True
    attentions = ("sdpa", "eager", "flex_attention")  # the encoder reads text, its padding, then the image
    target_limit = "max_target_length"

    def check(self) -> None:
        """Refuse what cannot work, from configurations only."""
        o, text = self.options, self._text_config
        if o.vision:
            patch = self._vision_config.patch_size
            patch = patch if isinstance(patch, int) else patch[0]
            if o.image_size <= 0 or o.image_size % patch:
                raise BadInput(
                    f"backbone.image_size: {o.image_size} is no positive multiple of the patch size {patch}."
                )
            if o.grid > o.image_size // patch:
                raise BadInput(f"backbone.grid: {o.grid}, but the tower sees {o.image_size // patch} patches a side.")
        places = o.grid**2 if o.grid else (o.image_size // patch) ** 2 if o.vision else 1
        if o.grid < 0 or places > o.order_tokens:
            raise BadInput(f"backbone.grid: {places} places need as many backbone.order_tokens, not {o.order_tokens}.")
        if o.max_images < 1 or o.feature_width < 1:
            raise BadInput("backbone.max_images and backbone.feature_width must be 1 or more.")
        for key in ("max_text_length", "max_target_length"):
            if not 3 <= getattr(o, key) <= text.max_position_embeddings:
                raise BadInput(
                    f"backbone.{key}: {getattr(o, key)} must lie between 3 (one word) and the "
                    f"{text.max_position_embeddings} positions of {o.text!r}."
                )

    def check_stored(self, features_are: str, numbers: int) -> str:
        """Refuse regions: the place of a row would be taken for a place of the picture, and pooling would mix regions
        that lie apart. They need their boxes, which are not stored."""
        if features_are == "regions":
            raise BadInput(
                "stored features are regions, and clip_bart reads grids, in which a row stands for a place of the "
                "picture. Store CLIP's grid features, or name a tower in backbone.vision."
            )
        rows = numbers // self.options.feature_width
        several = range(1, self.options.max_images + 1)
        if not any(rows % images == 0 and math.isqrt(rows // images) ** 2 * images == rows for images in several):
            raise BadInput(
                f"stored features of a sample have {rows} rows, which are no square grid. Store whole grids."
            )
        if features_are == "grid" or not rows:
            return ""
        if any(rows == images * count for images in several for count in REGION_COUNTS):
            raise BadInput(
                f"the manifest does not say whether the {rows} rows of a sample are a grid or the regions of a "
                "detector, which have the same number. Run prepare.py again with --features-are grid (or regions): "
                'the shards stay, manifest.json gets "features_are".'
            )
        return "the manifest does not say what the rows of stored features are; they are taken for a square grid."

    @property
    def most_images(self) -> int:
        """Those whose order has an embedding."""
        return self.options.max_images

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The model with frozen BART and tower, and a fresh visual embedding."""
        text = stock.load(
            BartForConditionalGeneration,
            self.options.text,
            "backbone.text",
            copy.deepcopy(self._text_config),
            self.dtype,
            self.attention,
            random_weights=self.options.random_weights,
            on_meta=on_meta,
            device=None if self.options.order_tokens else self.device,  # these are drawn, so on the host
        )
        with torch.random.fork_rng():
            torch.manual_seed(ORDER_SEED)
            if self.options.order_tokens:
                text.resize_token_embeddings(text.config.vocab_size + self.options.order_tokens, mean_resizing=False)
        config = self._config(text.config)
        vision = None
        if self.options.vision and not on_meta:
            loading = {
                "dtype": self.dtype,
                "attn_implementation": tower_loading.choose_attention(self.attention, self.dtype),
                **tower_loading.pooler_argument(self._vision_config, "vision", False),
                **tower_loading.placed(self.device),
            }
            vision = tower_loading.load_tower(self.options.vision, "backbone.vision", config.vision_config, **loading)
        if on_meta:
            with torch.device("meta"):
                model = ClipBart(config, vision, text).with_towers_in(self.dtype)
        else:
            with torch.random.fork_rng():
                # The same visual embedding on every rank and at every ZeRO stage, whatever loading has drawn before.
                torch.manual_seed(torch.initial_seed())
                model = ClipBart(config, vision, text)
        model.text_model.requires_grad_(False)
        if model.vision_model is not None:
            model.vision_model.requires_grad_(False)
        return model.train()

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Stored features as they are, or resized pixels; no augmentation, since answers may depend on the place."""
        o = self.options
        if not o.vision:
            return StoredGrid(o.feature_width, 0 if o.grid else o.order_tokens)
        return SquareTransform(o.image_size, o.fit, tower_loading.interpolation(o.resample, self._pixels))

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """Stack transformed images, or stored features. Raises BadInput where grids differ."""
        images = [torch.as_tensor(image) for image in images]
        if len({image.shape for image in images}) > 1:
            shapes = sorted({tuple(image.shape) for image in images})
            raise BadInput(
                f"image features of one batch differ: {shapes[0]} and {shapes[1]}. Store grids of one size."
            )
        return {"pixel_values" if self.options.vision else "image_features": torch.stack(images)}

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """Token ids and mask of the prompts; `decoder_input_ids` and `labels` of the targets, -100 where unknown.

        Prompts that are too long lose their middle, targets their end.
        """
        given = pairs(texts)
        prompts, targets = [t.prompt for t in given], [t.target for t in given]
        o, frame = self.options, self._texts.frame_length
        asked = [one.without_middle(o.max_text_length - frame) for one in self._texts.words(prompts)]
        said = [one.without_end(o.max_target_length - frame) for one in self._texts.words(targets)]
        read, target = self._texts.padded(asked), self._texts.padded(said)
        ids = target["input_ids"]
        start = torch.full_like(ids[:, :1], self._text_config.decoder_start_token_id)
        known = torch.tensor([bool(t) for t in targets])[:, None] & target["attention_mask"].bool()
        tensors = {
            "input_ids": read["input_ids"],
            "attention_mask": read["attention_mask"],
            "decoder_input_ids": torch.cat([start, ids[:, :-1]], 1),
            "labels": ids.masked_fill(~known, -100),
        }
        return collated(tensors, asked, said)

    def dummy(self, modality: str) -> Any:
        """As for every backbone, but zeros in place of stored features."""
        if modality == "text" or self.options.vision:
            return super().dummy(modality)
        return torch.zeros(max(self.options.grid, 1) ** 2, self.options.feature_width)

    def read(self, outputs: ClipBartOutput, batch: PackedBatch) -> GenerationOutput:
        """Logits as they are: the decoder's position s already predicts label s."""
        return GenerationOutput(outputs.logits, batch.texts["labels"])

    def generate(self, model: Any, batch: PackedBatch, choices: list[str] | None = None, **options: Any) -> list[str]:
        """The text generated after each prompt.

        Args:
            choices: the only answers that may be generated. Greedy decoding then compares the logits of the first
                token in which they differ.
            options: of transformers' `generate`.
        """
        if choices:
            known = [self._texts.framed(one) for one in self._texts.words(choices)]
            allowed = one_of(known, self._text_config.eos_token_id)
            options = {**options, "prefix_allowed_tokens_fn": allowed, "max_new_tokens": max(map(len, known)) + 1}
            # settings of the checkpoint for summaries, which would forbid some choices
            options |= {"no_repeat_ngram_size": 0, "forced_bos_token_id": None}
        asked = {name: value for name, value in self.inputs(batch).items() if name != "decoder_input_ids"}
        ids = model.generate(**asked, synced_gpus=in_step(model), **{"do_sample": False, **options})
        return self._spelling.decode_all(ids.tolist(), choices)

    def as_generated(self, text: str) -> str | None:
        """`text` through the tokenizer."""
        return self._spelling.as_generated(text)

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """The vision tower, unless something in it trains."""
        at, base = next((n, m) for n, m in model.named_modules() if isinstance(m, ClipBart))
        tower = base.vision_model
        if tower is None or any(p.requires_grad for p in tower.parameters()):
            return []
        return [f"{at}.vision_model" if at else "vision_model"]

    def image_prefix(self, model: Any) -> ImagePrefix | None:
        """The vision tower and the pooling of its grid."""
        tower = base_model(model).vision_model
        if tower is None or any(p.requires_grad for p in tower.parameters()):
            return None
        choice = {"norm": self.options.vision_norm, "grid": self.options.grid}
        return ImagePrefix(("vision_model", "pixel_norm"), choice | {"config": stock.arithmetic(self._vision_config)})

    @torch.no_grad()
    def image_values(self, model: Any, images: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """(n, F) grid features of each image, pooled."""
        return [{"image_features": x} for x in base_model(model).pooled_images(images["pixel_values"])]

    @property
    def condition_width(self) -> int | None:
        """Width of the vectors that adapters may route on, None without a condition."""
        return None if self.options.condition == "none" else self._text_config.d_model

    # configurations and parts

    @functools.cached_property
    def _text_config(self) -> PretrainedConfig:
        config = stock.read_config(self.options.text, "backbone.text", ("bart",))
        if not self.train_dropout:
            # BART calls dropout as a function, so there are no modules that could be put into eval mode.
            config.dropout = config.attention_dropout = config.activation_dropout = 0.0
        config.encoder_layerdrop = config.decoder_layerdrop = 0.0
        return config

    @functools.cached_property
    def _vision_config(self) -> PretrainedConfig:
        config = tower_loading.load_config(self.options.vision, "backbone.vision", "vision")
        if hasattr(config, "vision_use_head"):
            config.vision_use_head = False
        return config

    @functools.cached_property
    def _pixels(self) -> dict[str, Any]:
        return tower_loading.image_processor(self.options.vision, self._vision_config, "backbone.vision")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return stock.read_tokenizer(self.options.text, "backbone.text")

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._tokenizer)

    @functools.cached_property
    def _texts(self) -> TextIds:
        return TextIds(self._tokenizer)

    def _config(self, text: PretrainedConfig) -> ClipBartConfig:
        o = self.options
        vision = {}
        if o.vision:
            vision = {"pixel_mean": self._pixels["mean"], "pixel_std": self._pixels["std"]}
            vision["vision_config"] = copy.deepcopy(self._vision_config)
        config = ClipBartConfig(
            text_config=text,
            feature_width=self._vision_config.hidden_size if o.vision else o.feature_width,
            vision_norm=o.vision_norm,
            grid=o.grid,
            max_images=o.max_images,
            order_tokens=o.order_tokens,
            condition=o.condition,
            **vision,
        )
        config._attn_implementation = tower_loading.choose_attention(self.attention, self.dtype)
        return config


ENTRY = ClipBartBackbone
