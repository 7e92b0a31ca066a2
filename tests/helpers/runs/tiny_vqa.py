"""A small VQA data set in shards, and a recipe that trains a tiny model on it through the real launchers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.writer import PARTS, RawSample, write_manifest, write_shard
from mmpeft_ds.engine.assembly import resolve
from tests.helpers.runs import tiny_classifier

LABELS = ["red", "blue", "round", "big"]
QUESTIONS = ["is it red ?", "what is it ?", "is a big round ?"]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(i: int, answer: Callable[[int, int], int] = int.__add__) -> RawSample:
    """One image with one to three questions; `answer` gives the label of question k about image i, mod 4."""
    labels = [LABELS[answer(i, k) % 4] for k in range(1 + i % 3)]
    asked = [{"question": QUESTIONS[k], "answers": [label], "type": "toy"} for k, label in enumerate(labels)]
    return RawSample(name=f"source {i}", images=[("png", png(i))], record={"questions": asked}, features=None)


def write_data(
    folder: Path,
    train: int = 30,
    val: int = 7,
    per_shard: int = 8,
    answer: Callable[[int, int], int] = int.__add__,
) -> Manifest:
    """Shards of a train and a val split."""
    (folder / PARTS).mkdir(parents=True)
    numbers = {"train": range(train), "val": range(1000, 1000 + val)}
    splits = {split: [sample(i, answer) for i in chosen] for split, chosen in numbers.items()}
    parts: dict[str, list] = {}
    for split, samples in splits.items():
        starts = range(0, len(samples), per_shard)
        parts[split] = [
            write_shard(folder, "toy", split, n, first, samples[first : first + per_shard])
            for n, first in enumerate(starts)
        ]
    write_manifest(folder, "toy", "CC0-1.0", {"name": "toy"}, per_shard, parts, LABELS, "train")
    return Manifest.load(folder)


def recipe(folder: Path, **sections: Any) -> recipes.Recipe:
    """Recipe over FOLDER/data and FOLDER/vision, text; sections are merged into it one level deep."""
    task = {"name": "vqa", "loss": "ce"}
    raw: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "seed": 3,
        "backbone": {
            "name": "vision_text_encoder",
            "vision": str(folder / "vision"),
            "text": str(folder / "text"),
            "image_size": 8,
            "vision_feature": "cls",
            "feature_norm": "zscore",
            "head_input": "raw",
            "max_text_length": 12,
        },
        "method": {"name": "routed_lora", "r": 2, "alpha": 4, "route": "mul", "train_norms": True, "train_bias": True},
        "data": {
            "sources": [{"dir": str(folder / "data"), "split": "train", "task": task}],
            "validation": [{"dir": str(folder / "data"), "split": "val", "task": task}],
            "global_batch": 6,
            "workers": 0,
        },
        "optim": {"lr": 0.01, "epochs": 2, "weight_decay": 0.01, "clip": 1.0},
        "engine": {"deepspeed": "ds_configs/zero3.json", "threads": 1},
        "monitor": {"tensorboard": True, "samples": 0},
    }
    for name, section in sections.items():
        raw[name] = {**raw[name], **section} if isinstance(section, dict) else section
    return recipes.from_dict(raw)


def prepare(folder: Path) -> None:
    """Towers, shards and the feature statistics that the recipe asks for, and FOLDER/recipe.yaml."""
    tiny_classifier.make_towers(folder)
    manifest = write_data(folder / "data")
    made = recipe(folder)
    backbone = resolve.make_backbone(recipes.components(made).backbone, made.engine, LABELS)
    vector = np.linspace(0.5, 1.5, tiny_classifier.WIDTH).tolist()
    manifest.statistics[backbone.statistics_key()] = {"mean": vector, "std": vector[::-1], "count": 30}
    manifest.save(folder / "data")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipes.to_dict(made)))
