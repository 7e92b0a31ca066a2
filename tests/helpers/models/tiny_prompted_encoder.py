"""A tiny model of features that holds a tiny dual encoder with a text tower of either kind."""

from __future__ import annotations

from pathlib import Path

import torch

from mmpeft_ds.backbones.clip import backbone as clip
from mmpeft_ds.backbones.dual_encoder import backbone as dual_encoder
from mmpeft_ds.backbones.features import backbone as features
from tests.helpers.models import tiny_clip, tiny_towers

CLASSES = ["red circle", "big_blue square", "round"]


def write(folder: Path, kind: str) -> dict:
    """The `encoder` section: files of a `clip`, or of a dual encoder whose text tower is `bert` or `roberta`."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "clip":
        return {"name": "clip", "model": tiny_clip.write(folder, "clip")}
    return {
        "name": "dual_encoder",
        "vision": tiny_towers.write_vision(folder / "vision", "vit"),
        "text": tiny_towers.write_text(folder / "text", kind),
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
