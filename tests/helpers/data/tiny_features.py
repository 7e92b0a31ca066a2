"""A small data set of feature shards, written without any tower."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpeft_ds.data.feature_shards import write_class_texts
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.writer import PARTS, write_manifest, write_shard

CLASSES, WIDTH, TEXT_WIDTH, VIEWS = 3, 4, 6, 2


@dataclass
class RawFeatures:
    """As launchers/features.py writes a sample."""

    name: str
    features: Any
    arrays: dict = field(default_factory=dict)
    images: list = field(default_factory=list)
    record: dict = field(default_factory=dict)


def image_features(i: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(i).normal(size=(1 + VIEWS, WIDTH)).astype(dtype)


def text_features(i: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(1000 + i).normal(size=(1 + i % 2, TEXT_WIDTH)).astype(dtype)


def sample(i: int, dtype: Any = np.float32) -> RawFeatures:
    """Sample i of class i % CLASSES, with one caption or two."""
    texts = text_features(i, dtype)
    record = {
        "label": i % CLASSES,
        "class_name": f"class_{i % CLASSES}",
        "captions": [f"caption {j} of {i}" for j in range(len(texts))],
        "source_id": f"pixels/train-{i:09d}",
    }
    return RawFeatures(f"source {i}", image_features(i, dtype), {"text": texts}, record=record)


def write_features(
    dir: Path, samples: list[RawFeatures], per_shard: int = 4, name: str = "toy", **towers: Any
) -> Manifest:
    """A data set directory with one split, `train`."""
    (dir / PARTS).mkdir(parents=True)
    starts = range(0, len(samples), per_shard)
    parts = [write_shard(dir, name, "train", n, i, samples[i : i + per_shard]) for n, i in enumerate(starts)]
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(CLASSES, 2, TEXT_WIDTH, generator=generator) for _ in range(2))
    described = {
        "key": "0" * 16,
        "compute": "float32",
        "dtype": "float32",
        "views": VIEWS,
        "image_width": WIDTH,
        "text_width": TEXT_WIDTH,
        "logit_scale": 1.0,
        "classes": write_class_texts(dir, name, positive, negative),
        **towers,
    }
    labels = [f"class_{c}" for c in range(CLASSES)]
    write_manifest(
        dir, name, "CC0-1.0", {"name": "toy"}, per_shard, {"train": parts}, labels, "train", towers=described
    )
    return Manifest.load(dir)
