"""Heads on feature shards through the engine: trained, searched, solved, saved, loaded; the same on 1 and 2 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmpeft_ds import adapter
from mmpeft_ds.data.feature_shards import read_features
from mmpeft_ds.data.manifest import Manifest
from tests.helpers import launch
from tests.helpers.data import tiny_features

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.train_recipes"
METHODS = {
    "zero_shot": {"name": "zero_shot"},
    "linear_probe": {"name": "linear_probe"},
    "tip_adapter": {"name": "tip_adapter"},
    # a search would turn the last bits of trained keys into another grid point where two are equally right
    "tip_adapter_f": {"name": "tip_adapter", "train_keys": True, "search": False},
    "task_res": {"name": "task_res"},
    "clip_adapter": {"name": "clip_adapter"},
    "graph_adapter": {"name": "graph_adapter"},
    "hegraph": {"name": "hegraph"},
    "ga_net": {"name": "ga_net"},
}
# The others train with AdamW and a line; 3 steps an epoch.
OPTIM = {
    "task_res": {"name": "adam", "weight_decay": 5e-4, "schedule": "cosine_epoch"},
    "clip_adapter": {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "cosine_epoch", "warmup_lr": 1e-3},
}


def recipe(folder: Path, name: str, stage: int, ranks: int) -> Path:
    path = folder / f"{name}-{ranks}.yaml"
    source = {"dir": str(folder / "toy"), "task": {"name": "classification"}}
    text = "stored" if name == "ga_net" else "none"
    content = {
        "run_dir": str(folder / f"{name}-{ranks}"),
        "backbone": {"name": "features", "texts": text},
        "method": METHODS[name],
        "data": {"sources": [source], "validation": [source], "global_batch": 8, "workers": 0},
        "optim": {"epochs": 3, "lr": 0.01, **OPTIM.get(name, {"warmup": 0.0})},
        "engine": {"deepspeed": f"ds_configs/zero{stage}.json"},
        "monitor": {"tensorboard": False},
    }
    if name == "ga_net":
        source["task"] = {"name": "classification", "text": "captions"}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("heads")
    # as wide as its class texts, so that images can be compared with them
    wide = tiny_features.TEXT_WIDTH
    samples = []
    for i in range(21):
        made = tiny_features.sample(i)
        noise = np.random.default_rng(i).normal(size=(1 + tiny_features.VIEWS, wide)).astype(np.float32)
        noise[:, i % tiny_features.CLASSES] += 1.5
        made.features = noise
        samples.append(made)
    templates = {"templates": ["a {}", "{}"], "negative_templates": ["no {}", "no {}s"]}
    tiny_features.write_features(path / "toy", samples, image_width=wide, logit_scale=10.0, **templates)
    for ranks, stage in ((2, 3), (1, 0)):
        recipes = [str(recipe(path, name, stage, ranks)) for name in METHODS]
        result = launch.run_forked(SCRIPT, *recipes, ranks=ranks)
        assert result.code == 0 and not result.killed, result.tail()
    return path


def finished(folder: Path, name: str, ranks: int) -> dict:
    return json.loads((folder / f"{name}-{ranks}" / "finished.json").read_text())["metrics"]


@pytest.mark.parametrize("name", METHODS)
def test_one_rank_and_two_ranks_under_zero_3_come_to_the_same_head(folder, name):
    one, two = (adapter.load(folder / f"{name}-{ranks}" / "adapter") for ranks in (1, 2))
    stored = read_features(Manifest.load(folder / "toy"), "train")
    given = {"image_features": stored.image[:, 0], "text_features": stored.first_text}
    with torch.no_grad():
        a, b = (x.model(**given).logits for x in (one, two))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        with one.model.disable_adapter():
            base = one.model(**given).logits
    assert torch.equal(a, base) == (name == "zero_shot")
    steps = finished(folder, name, 2)["steps"]
    assert steps == (0 if name in ("zero_shot", "linear_probe", "tip_adapter") else 9)
    accuracy = finished(folder, name, 1)["best"]
    assert accuracy == pytest.approx(finished(folder, name, 2)["best"], abs=1e-6)


@pytest.mark.parametrize(("name", "warmup", "peak"), [("task_res", 1e-5, 0.01), ("clip_adapter", 1e-3, 0.1)])
def test_a_schedule_by_epochs_follows_the_epochs_of_the_stream(folder, name, warmup, peak):
    rows = [json.loads(line) for line in (folder / f"{name}-2" / "metrics.jsonl").read_text().splitlines()]
    rates = [(row["epoch"], row["lr"]) for row in rows if "lr" in row]
    expected = [warmup, peak, peak * 0.75]  # (1 + cos(pi / 3)) / 2
    assert rates == [(epoch, pytest.approx(expected[epoch])) for epoch in (0, 0, 0, 1, 1, 1, 2, 2, 2)]


def test_what_was_found_by_search_travels_with_the_adapter(folder):
    told = finished(folder, "linear_probe", 2)
    loaded = adapter.load(folder / "linear_probe-2" / "adapter")
    stored = read_features(Manifest.load(folder / "toy"), "train")
    rows = loaded.predict([image for image in stored.image[:, 0]], [""] * len(stored.key))
    right = sum(row["prediction"] == f"class_{int(label)}" for row, label in zip(rows, stored.label, strict=True))
    assert right / len(rows) > 0.9, told
    assert told["best"] == pytest.approx(right / len(rows)), "the table has the head that was solved, not the start"
