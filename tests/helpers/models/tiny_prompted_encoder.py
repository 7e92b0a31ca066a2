"""A tiny model of features that holds a tiny dual encoder with a text tower of any kind, and a batch for it."""

from __future__ import annotations

from pathlib import Path

import torch

from mmpeft_ds.backbones.clip import backbone as clip
from mmpeft_ds.backbones.dual_encoder import backbone as dual_encoder
from mmpeft_ds.backbones.features import backbone as features
from mmpeft_ds.data.batch import Described, PackedBatch, Sample, pack
from mmpeft_ds.tasks.classification import task as classification
from tests.helpers.models import tiny_clip, tiny_towers

CLASSES = ["red circle", "big_blue square", "round"]


def write(folder: Path, kind: str) -> dict:
    """The `encoder` section: files of a `clip` or `siglip`, or of a dual encoder whose text tower is `bert` or
    `roberta`; of `dinov2`, that of images reads the last layer as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("clip", "siglip"):
        return {"name": "clip", "model": tiny_clip.write(folder, kind)}
    raw = {"vision_feature": "cls", "vision_norm": False} if kind == "dinov2" else {}
    return {
        "name": "dual_encoder",
        **raw,
        "vision": tiny_towers.write_vision(folder / "vision", kind if raw else "vit"),
        "text": tiny_towers.write_text(folder / "text", "bert" if raw else kind),
        "image_size": 8,
        "max_text_length": 19,
        "projection": "mlp",
        "width": 12,
        "random_weights": False,
    }


def backbone(section: dict, texts: str = "none") -> features.FeaturesBackbone:
    """The backbone of features with that encoder, images live."""
    entry = {"clip": clip, "dual_encoder": dual_encoder}[section["name"]].ENTRY
    encoder = entry(entry.Options(**{k: v for k, v in section.items() if k != "name"}), None)
    encoder.check()
    made = features.ENTRY(features.Options(section, images="live", texts=texts), CLASSES)
    made.use_encoder(encoder)
    made.check()
    return made


def model(section: dict, dtype: torch.dtype = torch.float32) -> features.FeatureModel:
    """Built, with its class texts."""
    made = backbone(section)
    made.dtype = dtype
    built = made.build()
    made.read_classes(built)
    return built.eval()


def batch(made: features.FeaturesBackbone, count: int, labels: list[int]) -> PackedBatch:
    """So many images of random pixels, each with its class."""
    transform, generator = made.image_transform(False), torch.Generator().manual_seed(1)
    samples = []
    for number in range(count):
        pixels = torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8, generator=generator)
        image = transform(pixels, torch.Generator())
        samples.append(Sample(str(number), 1.0, [image], [Described()], [{"label": labels[number]}]))
    return pack(samples, made.collate_images, made.collate_texts, task().collate)


def task() -> classification.Classification:
    """Classification of these classes."""
    return classification.ENTRY(classification.Options(), CLASSES)
