"""Feature shards on 2 ranks have the bytes of 1; and training from them gives the losses of training from pixels."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmpeft_ds.data.manifest import Manifest
from tests.helpers import ROOT, launch
from tests.helpers.data.tiny_pictures import make, pictured, write_pixels, write_towers

pytestmark = pytest.mark.distributed
LAUNCHER = ROOT / "launchers" / "features.py"
SCRIPT = "tests.helpers.rank_scripts.train_recipes"
# stored as -> tolerance of a loss; rounding to half precision moves a feature of size 1 by 5e-4 at most
STORED = {"float32": 1e-6, "float16": 2e-3}
VIEWS = ["--views", "2", "--view-scale", "0.3", "1", "--thumbnails", "16", "--batch", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pixels, towers, and their features as one rank makes them."""
    path = tmp_path_factory.mktemp("features")
    pixels = write_pixels(path / "pixels", {"train": [pictured(i) for i in range(23)]})
    towers = write_towers(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in STORED:
        make(pixels, towers, path / dtype, dtype=dtype, batch=6)
    make(pixels, towers, path / "views", views=2, view_scale=(0.3, 1.0), thumbnails=16, batch=6)
    torch.set_num_threads(threads)
    return path


def test_two_ranks_write_the_bytes_of_one(folder):
    one, two = folder / "views", folder / "two"
    towers = Manifest.load(one).towers["backbone"]
    options = [f"--set={key}={towers[key]}" for key in ("vision", "text", "image_size", "max_text_length")]
    args = ["--data", folder / "pixels", "--out", two, "--backbone", towers["name"], *options, *VIEWS]
    result = launch.run_forked(LAUNCHER, *map(str, args))
    assert result.code == 0, result.tail()
    assert "23 samples in" in result.output
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert len(Manifest.load(one).shards("train")) == 5
    assert filecmp.cmpfiles(one, two, names, shallow=False)[0] == names


def recipe(folder: Path, kind: str, ranks: int, stage: int) -> Path:
    """A linear head on captions and images that are `live`, or stored as `kind`."""
    towers = Manifest.load(folder / "float32").towers["backbone"]
    source = "pixels" if kind == "live" else kind
    where = "live" if kind == "live" else "stored"
    backbone = {"name": "features", "images": where, "texts": where}
    if kind == "live":
        backbone["encoder"] = towers
    content = {
        "run_dir": str(folder / f"run-{kind}-{ranks}-{stage}"),
        "backbone": backbone,
        "method": {"name": "linear_probe", "solver": "gradient", "inputs": "both"},
        "data": {
            "sources": [{"dir": str(folder / source), "task": {"name": "classification", "text": "captions"}}],
            "global_batch": 8,
            "workers": 0,
            "shuffle_block": 7,
        },
        "optim": {"epochs": 3, "lr": 0.05, "warmup": 0.0},
        "engine": {"deepspeed": f"ds_configs/zero{stage}.json"},
        "monitor": {"tensorboard": False},
    }
    path = folder / f"{kind}-{ranks}-{stage}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(("ranks", "stage"), [pytest.param(1, 0, marks=pytest.mark.slow), (2, 3)])
def test_features_train_like_the_pixels_they_were_made_of(folder, ranks, stage):
    kinds = ["live", *STORED]
    result = launch.run_forked(SCRIPT, *(str(recipe(folder, kind, ranks, stage)) for kind in kinds), ranks=ranks)
    assert result.code == 0, result.tail()
    losses = {kind: read_losses(folder / f"run-{kind}-{ranks}-{stage}") for kind in kinds}
    assert len(losses["live"]) == 9
    assert losses["live"][0] > 1.2 * losses["live"][-1]  # it learns
    for kind, tolerance in STORED.items():
        np.testing.assert_allclose(losses[kind], losses["live"], atol=tolerance, rtol=0)
    assert losses["float16"] != losses["float32"]


def read_losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
