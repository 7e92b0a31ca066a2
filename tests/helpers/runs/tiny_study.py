"""A few-shot study on feature shards of two drawn "styles", small enough to run in seconds; and its recipe."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from data_prep import few_shot
from mmpeft_ds.data.feature_shards import write_class_texts
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.writer import PARTS, write_manifest, write_shard

CLASSES, WIDTH, VIEWS = ["cat", "dog", "eel", "fox", "gnu", "hen"], 8, 2
SIZES = {"train": 6, "val": 4, "test": 5}  # a class


@dataclass
class Sample:
    """As launchers/features.py writes a sample."""

    name: str
    features: Any
    arrays: dict
    record: dict
    images: list = field(default_factory=list)


def write_style(dir: Path, name: str, labels: list[str], shift: float = 0.0, key: str = "1" * 16) -> Manifest:
    """Features around a centre a class, moved by `shift`; captions say as much as images."""
    centres = np.random.default_rng(0).normal(size=(len(CLASSES), WIDTH)) * 2
    (dir / PARTS).mkdir(parents=True)
    parts = {}
    for split, size in SIZES.items():
        samples = []
        for label, class_name in enumerate(labels):
            for i in range(size):
                draw = np.random.default_rng([len(name), label, i, len(split)])
                centre = centres[CLASSES.index(class_name)]
                image = centre + shift + draw.normal(size=(1 + VIEWS, WIDTH))
                record = {"label": label, "class_name": class_name, "captions": [f"{split} {class_name} {i}"]}
                texts = {"text": (centre + draw.normal(size=(1, WIDTH))).astype(np.float32)}
                samples.append(Sample(f"{class_name} {i}", image.astype(np.float32), texts, record))
        parts[split] = [write_shard(dir, name, split, 0, 0, samples)]
    rows = torch.tensor(np.stack([centres[CLASSES.index(label)] for label in labels]))[:, None]
    noise = 2.0 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=rows.dtype)
    towers = {
        "key": key, "compute": "float32", "dtype": "float32", "views": VIEWS, "image_width": WIDTH,
        "text_width": WIDTH, "logit_scale": 10.0, "templates": ["a {}"], "negative_templates": ["no {}"],
        "classes": write_class_texts(dir, name, rows + noise, noise - rows),
    }  # fmt: skip
    write_manifest(dir, name, "CC0-1.0", {"name": "toy"}, 100, parts, labels, "train", towers=towers)
    return Manifest.load(dir)


def recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """Write two styles with their subsets below `root`, if not done, and return a study over them as a mapping."""
    if not (root / "plain-one").exists():
        write_style(root / "plain-one", "plain", CLASSES)
        write_style(root / "moved-one", "moved", CLASSES[::-1][:4], 0.5)
        few_shot.main(
            [str(root / "plain-one"), "--shots", "1", "2", "--seeds", "1", "2", "--classes", *few_shot.HALVES]
        )
    task, faster = {"name": "classification"}, {"optim": {"lr": 0.02}}
    return {
        "run_dir": str(root / "study"),
        "backbone": {"name": "features"},
        "data": {
            "sources": [{"dir": f"{root}/plain-{{features}}", "task": task}],
            "validation": [{"dir": f"{root}/plain-{{features}}", "split": "val", "task": task}],
            "global_batch": 6,
            "workers": 0,
        },
        "optim": {"epochs": 2, "lr": 0.01},
        "engine": {"deepspeed": "ds_configs/zero1.json", "keep_last": 1, "threads": 1},
        "monitor": {"tensorboard": False},
        "few_shot": {
            "shots": [1, 2],
            "seeds": [1, 2],
            "tests": [
                {"name": "plain", "dir": f"{root}/plain-{{features}}"},
                {"name": "moved", "dir": f"{root}/moved-{{features}}"},
            ],
        },
        "methods": [
            {"name": "Zero shot", "features": "one", "once": True, "method": {"name": "zero_shot"}},
            {"name": "TaskRes", "features": "one", "method": {"name": "task_res"}, "by_shots": {2: faster}},
        ],
        **changes,
    }  # fmt: skip


def write(path: Path, study: dict[str, Any]) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path
