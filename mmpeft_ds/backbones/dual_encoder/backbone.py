"""Backbone: any ViT-like vision tower and any BERT- or RoBERTa-like text encoder side by side, for retrieval and as
frozen encoders of images and texts.

Without projections and with `cls` features of ViT-B/16 and BERT it is the feature pair of GA-Net (arXiv 2408.00290;
specs/ganet.md 1.2). Aligned by the task `retrieval` and merged (`launchers/merge.py`) it can be used as CLIP is.
"""

# I images, T texts, L text length, V augmented passes, Dv and Dt widths of the features

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.encoders import EncoderPair
from mmpeft_ds.backbones.common.texts import collated
from mmpeft_ds.backbones.common.transform import SquareTransform
from mmpeft_ds.backbones.common.vision_backbone import VisionBackbone
from mmpeft_ds.backbones.dual_encoder.model import DualEncoder, DualEncoderConfig
from mmpeft_ds.backbones.dual_encoder.options import FIXED, Options
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.data.transform import ImageTransform
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.tower_keys import same_key


@dataclass(frozen=True)
class StoredVectors(ImageTransform):
    """Takes the stored features of one image, (1 + V, Dv): row 0 in evaluation; in training a random one of the V
    augmented passes, if there are any.

    Attributes:
        width: Dv.
        train: draw from the augmented passes.
    """

    width: int
    train: bool = False

    takes_features = True

    def __call__(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One row, float32 (Dv,). Raises BadSample."""
        rows = features.unsqueeze(0) if features.dim() == 1 else features
        if not rows.is_floating_point() or rows.dim() != 2 or not len(rows) or rows.shape[1] != self.width:
            raise BadSample("features", f"{features.dtype} of {tuple(features.shape)}, not (1 + V, {self.width})")
        row = 0
        if self.train and len(rows) > 1:
            row = 1 + int(torch.randint(len(rows) - 1, (), generator=generator))
        return rows[row].float()


class DualEncoderBackbone(VisionBackbone, EncoderPair):
    """Two towers as recipes use them."""

    Options = Options

    def use_features(self, towers: dict[str, Any]) -> None:
        """Check that the stored features, as the manifest describes them, are those of this vision tower.

        Raises:
            BadInput: naming the first difference.
        """
        if self.options.images == "live":
            raise BadInput(
                "backbone.images: live, but these shards hold features. Set images: stored, or name pixels."
            )
        section = dict(towers.get("backbone") or {})
        name = section.pop("name", "unknown")
        if name != "dual_encoder":
            raise BadInput(f"backbone: the stored features were made by {name!r}. Make some with dual_encoder.")
        theirs = DualEncoderBackbone(Options(**section), None)
        if theirs.options.projection != "none" or theirs.options.model:
            raise BadInput(
                "backbone.images: stored, but these features have gone through projections. Make them with "
                "projection: none."
            )
        made, wanted = theirs._vision_choice(), self._vision_choice()
        if self.options.model:  # its weights are those of all towers together
            made.pop("weights"), wanted.pop("weights")
        if differing := [key for key in wanted if made.get(key) != wanted[key]]:
            raise BadInput(
                f"backbone.vision: the stored features are of another one ({differing[0]}: {made[differing[0]]}, here "
                f"{wanted[differing[0]]}). Name the tower that made them, or make them again."
            )
        if not same_key(towers.get("key"), theirs.towers_key()):
            raise BadInput("backbone.vision: the files of the tower that made the stored features have changed.")

    def check(self) -> None:
        """Refuse what cannot work, from configurations only."""
        o = self.options
        if o.model:
            defaults = Options()
            if given := [key for key in FIXED if getattr(o, key) != getattr(defaults, key)]:
                raise BadInput(f"backbone.{given[0]}: backbone.model {o.model!r} fixes it. Leave it out.")
        elif not o.vision or not o.text:
            missing = "text" if o.vision else "vision"
            raise BadInput(f"backbone.{missing}: missing. Name both towers, or a whole dual encoder as `model`.")
        else:
            self._check_vision()
        text = self._text_config
        room = text.max_position_embeddings - (0 if text.model_type == "bert" else text.pad_token_id + 1)
        if not 3 <= o.max_text_length <= room:
            raise BadInput(
                f"backbone.max_text_length: {o.max_text_length}, but the text tower takes 3 to {room} tokens."
            )
        if o.width < 1 or not 0 <= o.projection_dropout < 1 or o.logit_scale <= 0:
            raise BadInput(
                "backbone.width is at least 1, projection_dropout in [0, 1), logit_scale above 0 (1 / temperature)."
            )

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The model with frozen pretrained towers, and fresh projections where no `model` brings them."""
        config = self._config()
        if self.options.model:
            load = (DualEncoder, self.options.model, "backbone.model", config, self.dtype, self.attention)
            model = stock.load(*load, self.options.random_weights, on_meta, self.device)
        elif on_meta:
            with torch.device("meta"):
                model = DualEncoder(config).with_towers_in(self.dtype)
        else:
            vision = self._load_vision(config.vision_config) if config.images == "live" else None
            text = self._load_text(config)
            with torch.random.fork_rng():
                # The same projections on every rank and at every ZeRO stage, however many draws loading took.
                torch.manual_seed(torch.initial_seed())
                model = DualEncoder(config, vision, text)
        return model.requires_grad_(False).train()

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Resize to the tower's input, no augmentation; or one row of stored features."""
        if self.options.images == "stored":
            return StoredVectors(self._vision_config.hidden_size, train)
        return self._square()

    def _square(self) -> SquareTransform:
        if not self.options.model:
            return super()._square()
        return SquareTransform(self._saved.image_size, self._saved.fit, self._saved.resample)

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """Token ids and mask, as long as the longest text of this batch; longer ones lose their end."""
        plain = [f"{t.prompt} {t.target}".strip() if isinstance(t, Prompted) else t for t in texts]
        room = self.options.max_text_length - self._texts.frame_length
        words = [one.without_end(room) for one in self._texts.words(plain)]
        return collated(self._texts.padded(words), words)

    def dummy(self, modality: str) -> Any:
        """As of every backbone; of stored features zeros."""
        if modality == "image" and self.options.images == "stored":
            return torch.zeros(1, self._vision_config.hidden_size)
        return super().dummy(modality)

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """Each tower without a trainable, or its embeddings."""
        towers = {"vision_model": "embeddings", "text_model": "embeddings"}
        return stock.untrained(model, {t: e for t, e in towers.items() if getattr(model, t) is not None})

    @property
    def feature_widths(self) -> tuple[int, int]:
        """Widths (Dv, Dt) of the features of images and texts."""
        return self._config().feature_widths

    def logit_scale_of(self, model: nn.Module) -> float:
        """1 / temperature; 1 for towers that were not aligned."""
        if not self.options.model and base_model(model) is model:
            return 1.0
        return float(model.logit_scale.log_scale.detach().double().exp())

    def towers_key(self) -> str:
        """Hash of weights, configurations, image transform, and everything else that features depend on.

        Raises:
            BadInput: if they would depend on projections that are not trained.
        """
        o = self.options
        if o.projection != "none" and not o.random_weights:
            raise BadInput(
                f"backbone.projection: {o.projection} is not trained, features after it mean nothing. Use none, or "
                "the model that launchers/merge.py writes after alignment."
            )
        weights = "random" if o.random_weights else [self._vision_choice()["weights"], self._text_hash()]
        choice = {
            **self._vision_choice(),
            "weights": weights,
            "text_feature": self._config().text_feature,
            "max_text_length": o.max_text_length,
        }
        return stock.tower_key(choice, self._vision_config, self._text_config)

    def _vision_choice(self) -> dict[str, Any]:
        if not self.options.model:
            return super()._vision_choice()
        saved = self._saved
        return {
            "weights": tower_loading.weights_hash(self.options.model, "backbone.model"),
            "layers": saved.vision_config.num_hidden_layers,
            "feature": saved.vision_feature,
            "norm": saved.vision_norm,
            "transform": asdict(self._square()),
            "mean": saved.pixel_mean,
            "std": saved.pixel_std,
        }

    def _text_hash(self) -> str:
        return "" if self.options.model else tower_loading.weights_hash(self.options.text, "backbone.text")

    # configurations and parts

    def _config(self) -> DualEncoderConfig:
        o = self.options
        if o.model:
            config = copy.deepcopy(self._saved)
        else:
            transform = self._square()
            config = DualEncoderConfig(
                vision_config=copy.deepcopy(self._vision_config),
                text_config=copy.deepcopy(self._text_config),
                vision_feature=o.vision_feature,
                vision_norm=o.vision_norm,
                pixel_mean=self._pixels["mean"],
                pixel_std=self._pixels["std"],
                image_size=transform.size,
                fit=transform.fit,
                resample=transform.resample,
                text_feature=o.text_feature,
                projection=o.projection,
                width=o.width,
                logit_scale=o.logit_scale,
            )
        config.max_text_length = o.max_text_length
        config.projection_dropout = o.projection_dropout
        config.train_projection, config.train_logit_scale = o.train_projection, o.train_logit_scale
        config.images, config.train_dropout = o.images, self.train_dropout
        config._attn_implementation = tower_loading.choose_attention(self.attention, self.dtype)
        return config

    @functools.cached_property
    def _saved(self) -> DualEncoderConfig:
        return stock.read_config(self.options.model, "backbone.model", (DualEncoderConfig.model_type,))

    @functools.cached_property
    def _vision_config(self) -> PretrainedConfig:
        return self._saved.vision_config if self.options.model else super()._vision_config

    @functools.cached_property
    def _text_config(self) -> PretrainedConfig:
        if self.options.model:
            return self._saved.text_config
        return tower_loading.load_config(self.options.text, "backbone.text", "text")

    @functools.cached_property
    def _pixels(self) -> dict[str, Any]:
        if self.options.model:
            return {"mean": self._saved.pixel_mean, "std": self._saved.pixel_std, "resample": self._saved.resample}
        return super()._pixels

    @functools.cached_property
    def _tokenizer(self) -> Any:
        if self.options.model:
            return stock.read_tokenizer(self.options.model, "backbone.model")
        return super()._tokenizer

    def _load_text(self, config: DualEncoderConfig) -> PreTrainedModel:
        pooler = self.options.text_feature == "pooler"
        if self.options.random_weights:
            return self._random_tower(config.text_config, "text", pooler)
        extra = tower_loading.pooler_argument(config.text_config, "text", pooler)
        return tower_loading.load_tower(
            self.options.text, "backbone.text", config.text_config, **self._loading(), **extra
        )


ENTRY = DualEncoderBackbone
