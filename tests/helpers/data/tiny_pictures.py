"""A small data set of pictures with captions and classes, and towers to read them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.writer import PARTS, write_manifest, write_shard
from mmpeft_ds.precompute import features
from mmpeft_ds.precompute.features import FeatureOptions, Maker, Plan, make_plan
from tests.helpers.data.images import encoded
from tests.helpers.data.tiny_shards import RawSample
from tests.helpers.models.tiny_towers import write_text, write_vision

CLASSES = 3
TEXTS = ["a red circle", "is it big", "the blue square is there"]


def pictured(i: int) -> RawSample:
    """Sample i of class i % CLASSES, with one caption or two."""
    captions = [TEXTS[i % 3], TEXTS[(i + 1) % 3]][: 1 + i % 2]
    record = {"label": i % CLASSES, "class_name": f"big_shape_{i % CLASSES}", "captions": captions}
    return RawSample(f"source {i}", [("jpg", encoded(i))], record)


def write_pixels(dir: Path, samples: dict[str, list[RawSample]], per_shard: int = 5) -> Manifest:
    """A data set directory with these splits."""
    (dir / PARTS).mkdir(parents=True)
    parts = {
        split: [
            write_shard(dir, "shapes", split, number, first, own[first : first + per_shard])
            for number, first in enumerate(range(0, len(own), per_shard))
        ]
        for split, own in samples.items()
    }
    labels = [f"big_shape_{c}" for c in range(CLASSES)]
    write_manifest(dir, "shapes", "CC0-1.0", {"name": "toy"}, per_shard, parts, labels, "train")
    return Manifest.load(dir)


def write_towers(dir: Path) -> dict:
    """Options of a dual encoder with random weights below `dir`."""
    vision, text = write_vision(dir / "vision", "vit"), write_text(dir / "text", "bert")
    return {"name": "dual_encoder", "vision": vision, "text": text, "image_size": 8, "max_text_length": 20}


def recipe(towers: dict, **engine: Any) -> recipes.Recipe:
    """A recipe of which only the backbone counts."""
    return recipes.from_dict({"run_dir": "x", "backbone": dict(towers), "method": {"name": "lora"}, "engine": engine})


def start(source: Manifest, towers: dict, out: Path, dtype: str = "float16", **options: Any) -> tuple[Maker, Plan]:
    """A plan and who carries it out, without a process group."""
    options = FeatureOptions(data=source.dir, out=out, dtype=dtype, **{"batch": 4, **options})
    maker = Maker(recipe(towers), source, options, torch.device("cpu"), None)
    plan = make_plan(source, options, maker.towers())
    return maker, plan


def make(source: Manifest, towers: dict, out: Path, **options: Any) -> Manifest:
    """Features of a whole data set, as one rank with one thread makes them."""
    maker, plan = start(source, towers, out, **options)
    maker.build()
    for job in plan.todo:
        maker.write(job)
    features._finish(maker, plan, 1.0)
    return Manifest.load(out)
