"""GA-Net from feature shards with captions on two ranks, by the trainer: trained, tau searched, reported, loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmpeft_ds import adapter
from tests.helpers import launch
from tests.helpers.data import tiny_features

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.ga_net_run"
SAMPLES, BATCH, EPOCHS = 45, 20, 8
GRID = [-0.5, 0.6, 0.9]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ga_net_run")
    samples = []
    for i in range(SAMPLES):
        made = tiny_features.sample(i)
        for features in (made.features, made.arrays["text"]):
            features[:, i % tiny_features.CLASSES] += 2.5
        samples.append(made)
    tiny_features.write_features(folder / "toy", samples)
    source = {"dir": str(folder / "toy"), "task": {"name": "classification", "text": "captions"}}
    content = {
        "run_dir": str(folder / "run"),
        "backbone": {"name": "features"},
        "method": {"name": "ga_net", "r": 8, "tau": 0.5, "tau_grid": GRID, "tau_batch": BATCH},
        "data": {"sources": [source], "validation": [source], "global_batch": BATCH, "workers": 0},
        "optim": {"epochs": EPOCHS, "lr": 0.03, "warmup": 0.0},
        "engine": {"deepspeed": "ds_configs/zero3.json", "eval_every": 1000},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    result = launch.run_forked(SCRIPT, str(folder / "recipe.yaml"), ranks=2)
    assert result.code == 0 and not result.killed, result.tail()
    return folder / "run"


def test_it_trains_on_two_ranks(run):
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == EPOCHS * 3 and losses[-1] < 0.7 * losses[0]
    assert json.loads((run / "finished.json").read_text())["metrics"]["tau"] in GRID


def test_the_adapter_holds_the_tau_that_was_found(run):
    told = json.loads((run / "finished.json").read_text())["metrics"]
    loaded = adapter.load(run / "adapter")
    head = loaded.model.get_base_model().features.head
    assert head.tau == told["tau"]
    # what the run said of its last evaluation is what the loaded model does on the same graphs' worth of samples
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(5, tiny_features.WIDTH))).float()
    texts = torch.from_numpy(rng.normal(size=(5, tiny_features.TEXT_WIDTH))).float()
    with torch.no_grad():
        out = loaded.model(image_features=rows, text_features=texts)
    assert out.logits.shape == (5, tiny_features.CLASSES) and torch.isfinite(out.logits).all()


def test_the_report_of_a_run_is_written(run):
    report = json.loads((run / "graph-report-train.json").read_text())
    assert report["rows"] == SAMPLES
    orders = [line["order"] for line in report["lines"]]
    assert orders[0] == "no edges" and orders[-1] == "sorted by class" and len(orders) == 5
    assert all(line["top1"] > 0.5 for line in report["lines"][1:])
