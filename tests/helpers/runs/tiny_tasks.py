"""Three tasks with grid features in shards, a tiny BART, and a recipe that trains on all of them in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.writer import PARTS, RawSample, write_manifest, write_shard
from tests.helpers.models import tiny_clip_bart

COLORS = ["red", "blue", "round", "big"]
SIZES = {"vqa": 13, "nlvr": 8, "coco": 10}
TASKS = {
    "vqa": {"name": "answering", "prompt": "vqa : ", "score_weight": True, "max_new_tokens": 4},
    "nlvr": {"name": "answering", "prompt": "nlvr : ", "choices": ["true", "false"]},
    "coco": {"name": "captioning", "prompt": "caption : ", "max_length": 6, "num_beams": 2},
}


def sample(kind: str, i: int) -> RawSample:
    """One grid (two for nlvr) with one or two questions, or two captions."""
    rng = np.random.default_rng(i + 100 * len(kind))
    grids = rng.standard_normal((2 if kind == "nlvr" else 1, 9, tiny_clip_bart.FEATURES)).astype(np.float16)
    if kind == "coco":
        record: dict[str, Any] = {"captions": [f"a {COLORS[i % 4]} circle", f"the {COLORS[i % 4]} shape"]}
    elif kind == "nlvr":
        record = {"questions": [{"question": "is it the same", "answers": [["true", "false"][i % 2]]}]}
    else:
        ten = [COLORS[i % 4]] * 7 + [COLORS[(i + 1) % 4]] * 3
        record = {"questions": [{"question": "what color is it", "answers": ten}] * (1 + i % 2)}
    features = grids if kind == "nlvr" else grids[0]
    return RawSample(name=f"{kind} {i}", images=[], record=record, features=features)


def write_data(folder: Path, kind: str) -> None:
    (folder / PARTS).mkdir(parents=True)
    splits = {"train": [sample(kind, i) for i in range(SIZES[kind])], "val": [sample(kind, 50 + i) for i in range(3)]}
    parts = {}
    for split, samples in splits.items():
        shards = range(0, len(samples), 5)
        parts[split] = [write_shard(folder, kind, split, n, at, samples[at : at + 5]) for n, at in enumerate(shards)]
    write_manifest(folder, kind, "CC0-1.0", {"name": "toy"}, 5, parts, None, "train")


def recipe(folder: Path, **sections: Any) -> recipes.Recipe:
    """Recipe over what `prepare` wrote; sections are merged into it one level deep."""
    raw: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "seed": 3,
        "backbone": {
            "name": "clip_bart",
            "text": str(folder / "bart"),
            "feature_width": tiny_clip_bart.FEATURES,
            "grid": 2,
            "order_tokens": 9,
        },
        "method": {
            "name": "routed_lora",
            "r": 2,
            "alpha": 4,
            "tower": ["text"],
            "route": "mul",
            "train_bias": ["text_model.*"],
        },
        "data": {
            "sources": [
                {"dir": str(folder / k), "split": "train", "task": TASKS[k], "weight": 2.0 if k == "nlvr" else 1.0}
                for k in TASKS
            ],
            "validation": [{"dir": str(folder / k), "split": "val", "task": TASKS[k]} for k in TASKS],
            "global_batch": 4,
            "workers": 0,
        },
        "optim": {"lr": 0.01, "epochs": 2, "warmup": 0.0, "schedule": "constant", "clip": 5.0},
        "engine": {"deepspeed": "ds_configs/zero3.json", "threads": 1},
        "monitor": {"tensorboard": False, "samples": 0},
    }
    for name, section in sections.items():
        raw[name] = {**raw[name], **section} if isinstance(section, dict) else section
    return recipes.from_dict(raw)


def prepare(folder: Path) -> None:
    """The model, three data sets and FOLDER/recipe.yaml."""
    tiny_clip_bart.write_bart(folder / "bart")
    for kind in TASKS:
        write_data(folder / kind, kind)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipes.to_dict(recipe(folder))))
