"""Conversations of very different lengths about no, one or two small pictures, and recipes that train on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.writer import RawSample
from tests.helpers.data.images import encoded
from tests.helpers.data.tiny_shards import write_shards
from tests.helpers.models import tiny_mllm

SAMPLES = 30


def talk(i: int) -> RawSample:
    """Of up to four turns, now and then a long one; every third without a picture."""
    draw = random.Random(i)
    pictures = (1, 2, 0)[i % 3]
    turns = []
    for turn in range(draw.choice([1, 1, 1, 2, 4])):
        marks = "<image>\n" * pictures if turn == 0 else ""
        answer = " ".join(draw.choices(["red", "blue", "a", "big", "circle", "yes", "no"], k=draw.choice([1, 3, 20])))
        turns += [{"from": "human", "value": f"{marks}what is it ?"}, {"from": "gpt", "value": answer}]
    return RawSample(f"talk {i}", [("jpg", encoded(i + n)) for n in range(pictures)], {"conversations": turns})


def write(folder: Path, family: str = "qwen2_vl", samples: int = SAMPLES) -> Manifest:
    """FOLDER/model and FOLDER/data."""
    tiny_mllm.write(folder / "model", family)
    return write_shards(folder / "data", [talk(i) for i in range(samples)], per_shard=11, name="talk")


def recipe(folder: Path, name: str, stage: int = 1, **changes: Any) -> str:
    """Writes FOLDER/NAME.yaml, whose run directory is FOLDER/NAME; `changes` are keys such as `data.pack`."""
    task = {"name": "instruction", "max_new_tokens": 0}
    raw: dict[str, Any] = {
        "run_dir": str(folder / name),
        "seed": 5,
        "backbone": {"name": "mllm", "model": str(folder / "model"), "max_text_length": 200},
        "method": {"name": "lora", "r": 2},
        "data": {
            "sources": [{"dir": str(folder / "data"), "split": "train", "task": task}],
            "global_batch": 12,
            "workers": 0,
        },
        "optim": {"lr": 0.01, "max_steps": 5, "warmup": 0.0, "schedule": "constant"},
        "engine": {"deepspeed": f"ds_configs/zero{stage}.json", "dtype": "float32", "threads": 1, "save_every": 3},
        "monitor": {"tensorboard": False, "samples": 0},
    }
    for key, value in changes.items():
        section, _, option = key.partition("__")
        raw[section][option] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)
