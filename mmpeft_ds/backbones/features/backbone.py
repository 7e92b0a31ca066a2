"""Backbone: features of frozen encoders, stored in feature shards or computed in every step, for heads on them."""

# I images, T texts, C classes, D widths, V augmented passes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.features.model import ClassificationOutput, FeatureConfig, FeatureModel, ZeroShot
from mmpeft_ds.backbones.features.options import Options
from mmpeft_ds.data.batch import Described, PackedBatch, id_number
from mmpeft_ds.data.transform import ImageTransform
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.host_copies import both, to_device
from mmpeft_ds.ops.precision import at_least_float32, widened
from mmpeft_ds.sites.feature_site import Bank
from mmpeft_ds.tower_keys import same_key

__all__ = ["ENTRY", "ClassificationOutput", "FeatureConfig", "FeatureModel", "FeaturesBackbone", "ZeroShot"]


@dataclass(frozen=True)
class ViewTransform(ImageTransform):
    """Stored features of a sample, (1 + V, D) or (D,) -> (D,): the evaluation view, or one of the augmented passes.

    Attributes:
        augmented: draw a pass, if there are any.
    """

    augmented: bool
    takes_features = True
    takes_one_row = True

    def row(self, rows: int, seed: int) -> int:
        """Index of the stored pass (of `rows`, 1 + V) that a sample reads: an augmented one by this seed, or 0."""
        return 1 + seed % (rows - 1) if self.augmented and rows > 1 else 0

    def __call__(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if features.dtype == torch.uint8:  # an image, given to an adapter that was trained on stored features
            raise BadInput("pixels, but this model reads stored features. Give features (D,), or set images: live.")
        if not features.is_floating_point() or features.dim() not in (1, 2) or not features.numel():
            raise BadSample("features", f"{features.dtype} of {tuple(features.shape)}, not (1 + V, D)")
        if features.dim() == 1:
            return features
        return features[self.row(len(features), 0 if generator is None else generator.initial_seed())]


class FeaturesBackbone(BackboneBase):
    """Models of features as recipes use them."""

    Options = Options
    reads_bank = True

    def __init__(self, options: Options, labels: list[str] | None):
        super().__init__(options, labels)
        self.towers: dict[str, Any] = {}
        self.encoder: BackboneBase | None = None
        self.bank: dict[str, Tensor] = {}
        self.trained_classes: list[int] | None = None

    def use_features(self, towers: dict[str, Any]) -> None:
        """Take what the manifest says of the stored features."""
        self.towers = dict(towers)

    def use_encoder(self, encoder: BackboneBase) -> None:
        """Take the backbone that computes what is not stored."""
        if not encoder.embeds:
            raise BadInput("backbone.encoder: this backbone gives no features. Use clip or dual_encoder.")
        self.encoder = encoder

    def use_bank(self, bank: dict[str, Tensor]) -> None:
        """Take class texts and support samples."""
        self.bank = dict(bank)

    def use_trained_classes(self, classes: list[int]) -> None:
        """Take which classes occur in training."""
        self.trained_classes = list(classes)

    def check(self) -> None:
        """Refuse what cannot work."""
        o = self.options
        if not self.labels:
            raise BadInput("backbone: the data set has no closed list of labels. Prepare it with a source of classes.")
        if o.encoder is None:
            for key in ("images", "texts"):
                if getattr(o, key) == "live":
                    raise BadInput(f"backbone.{key}: live needs backbone.encoder, which names the towers.")
            if not self.towers:
                raise BadInput(
                    "backbone: these shards hold no features. Make some with launchers/features.py, or name "
                    "backbone.encoder and set images: live."
                )
        elif self.towers and not same_key(self.towers.get("key"), self.encoder.towers_key()):
            raise BadInput(
                "backbone.encoder: the stored features were made by other towers or another transform (key "
                f"{self.towers.get('key')}, here {self.encoder.towers_key()}). Make them again with this encoder."
            )
        elif not self.towers and o.images == "stored":
            raise BadInput("backbone.images: stored, but these shards hold no features. Set images: live.")

    @property
    def widths(self) -> tuple[int, int]:
        """D of image and of caption features; 0 where there are none."""
        if self.encoder is not None:
            image, text = self.encoder.feature_widths
        else:
            image, text = self.towers["image_width"], self.towers.get("text_width", 0)
        return image, 0 if self.options.texts == "none" else text

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The model, everything frozen."""
        image, text = self.widths
        encoder, scale = None, float(self.towers.get("logit_scale") or 1.0)
        if self.encoder is not None:
            for name in ("dtype", "attention", "train_dropout", "device"):
                setattr(self.encoder, name, getattr(self, name))
            encoder = self.encoder.build(on_meta)
            if not self.towers and not on_meta:
                scale = self.encoder.logit_scale_of(encoder)
        config = FeatureConfig(
            image_width=image,
            text_width=text,
            num_classes=len(self.labels or []),
            logit_scale=scale,
            ensemble=self.options.ensemble,
            live_images=self.options.images == "live",
        )
        # Labels keep their numbers, which decide how many rows of the cache a rank has.
        bank = {
            name: tensor.to("meta") if on_meta and tensor.is_floating_point() else tensor
            for name, tensor in self.bank.items()
        }
        if self._live_classes:
            for name, templates in self._templates.items():
                shape = (config.num_classes, len(templates), image)
                bank[name] = torch.zeros(shape, device="meta" if on_meta else None)
        model = FeatureModel(
            config,
            Bank(config.num_classes, **bank),
            encoder,
            self.encoder and self.encoder.embed,
            self._class_names,
            self.encoder and self.encoder.collate_texts,
            self.trained_classes,
        )
        return model.requires_grad_(False).train()

    def read_classes(self, model: nn.Module) -> None:
        """If no class texts are stored, fill the bank with the encoder's features of the class names."""
        if not self._live_classes:
            return
        names = self._class_names
        for part, templates in self._templates.items():
            texts = [template.replace("{}", name) for name in names for template in templates]
            was_training = model.encoder.training
            with torch.no_grad():
                rows = self.encoder.embed_texts(model.encoder.eval(), texts)
            model.encoder.train(was_training)
            getattr(model.features.bank, part).copy_(rows.view(len(names), len(templates), -1))

    @property
    def prompt_limit(self) -> str:
        """The key of the encoder, which reads the captions."""
        return f"encoder.{self.encoder.prompt_limit}" if self.encoder is not None else super().prompt_limit

    @property
    def _class_names(self) -> list[str]:
        """Names of the classes in words."""
        return [label.replace("_", " ") for label in self.labels or []]

    @property
    def _live_classes(self) -> bool:
        """Whether class texts come from the encoder: none are stored, and its towers are of equal width."""
        equal = self.encoder is not None and self.encoder.feature_widths[0] == self.encoder.feature_widths[1]
        return equal and not self.towers

    @property
    def _templates(self) -> dict[str, list[str]]:
        return {"positive": self.options.templates, "negative": self.options.negative_templates}

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Choice of a stored view, or the transform of the encoder."""
        if self.options.images == "live":
            return self.encoder.image_transform(train)
        return ViewTransform(train)

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """`image_features` (I, Dv), at least float32, of a list of rows or a tensor; or the encoder's arguments.

        Raises:
            BadInput: stored features of another width than the towers of this model give.
        """
        if self.options.images == "live":
            return self.encoder.collate_images(images)
        rows = images if isinstance(images, Tensor) else torch.stack([_wide(image) for image in images])
        width = self.widths[0] if self.encoder or self.towers else rows.shape[-1]
        if rows.shape[-1] != width:
            raise BadInput(f"stored features of width {rows.shape[-1]}, and this model reads {width}.")
        return {"image_features": widened(rows)}

    def collate_texts(self, texts: list[Any]) -> dict[str, Tensor]:
        """`text_features` (T, Dt), zeros for a text without any; or the encoder's arguments; nothing where captions
        are left out."""
        if self.options.texts == "live":
            return self.encoder.collate_texts([str(text) for text in texts])
        width = self.widths[1]
        if not width:
            return {}
        rows = [t.features if isinstance(t, Described) and t.features is not None else None for t in texts]
        dtype = next((_wide(row).dtype for row in rows if row is not None), torch.float32)
        return {
            "text_features": torch.stack(
                [torch.zeros(width, dtype=dtype) if row is None else _wide(row) for row in rows]
            )
        }

    def dummy(self, modality: str) -> Any:
        """Zeros in place of stored features, or the dummy of the encoder."""
        live = self.options.images if modality == "image" else self.options.texts
        if live == "live":
            return self.encoder.dummy(modality)
        return torch.zeros(self.widths[0]) if modality == "image" else Described()

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments."""
        keys = batch.id_numbers
        if keys is None:
            keys = torch.tensor([id_number(name) for name in batch.sample_id], dtype=torch.int64)
        inputs: dict[str, Any] = {
            "image_features": batch.images.get("image_features"),
            "text_features": batch.texts.get("text_features"),
            "image_owner": batch.image_owner,
            "text_owner": batch.text_owner,
            "valid": both(lambda weight: weight > 0, batch.text_weight),
            "key": to_device(keys, batch.weight.device)[batch.text_owner],
            "num_slots": len(batch.sample_id),
        }
        if "live" in (self.options.images, self.options.texts):
            inputs["batch"] = batch
        return inputs

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """The encoder, unless something in it trains."""
        frozen = self.encoder is not None and not any(p.requires_grad for p in model.encoder.parameters())
        return ["encoder"] if frozen else []


ENTRY = FeaturesBackbone


def _wide(x: Any) -> Tensor:
    """At least float32."""
    return at_least_float32(torch.as_tensor(x))
