"""Heads that a checkpoint brings in half precision train in float32, whichever stage partitions the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mmpeft_ds import recipe as recipes
from tests.helpers import launch
from tests.helpers.runs import tiny_adapters

pytestmark = pytest.mark.distributed


def test_losses_of_a_bfloat16_base_with_trained_heads_are_the_same_at_zero_1_and_3(tmp_path: Path):
    raw = recipes.to_dict(tiny_adapters.recipe(tmp_path, "retrieval with blip"))
    raw["backbone"]["momentum"] = 0.0  # a teacher cannot follow heads that are held in parts
    raw["engine"]["dtype"] = "bfloat16"
    paths = []
    for stage in (1, 3):
        raw["run_dir"], raw["engine"]["deepspeed"] = str(tmp_path / f"run{stage}"), f"ds_configs/zero{stage}.json"
        paths.append(tmp_path / f"{stage}.yaml")
        paths[-1].write_text(yaml.safe_dump(raw))
    result = launch.run_forked("tests.helpers.rank_scripts.train_recipes", *map(str, paths), ranks=1, timeout=200)
    assert result.code == 0, result.tail()
    lines = [(tmp_path / f"run{stage}" / "metrics.jsonl").read_text().splitlines() for stage in (1, 3)]
    one, three = ([json.loads(line)["loss"] for line in of_run] for of_run in lines)
    assert len(one) == 2 and one == three
