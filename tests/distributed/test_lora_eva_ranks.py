"""A run of LoRA that starts from data is evaluated from its checkpoint, and goes on with another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mmpeft_ds import recipe as recipes
from tests.helpers import launch
from tests.helpers.runs import tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.train_recipes"


def write(folder: Path, name: str, start: str, stage: int, steps: int) -> str:
    raw = recipes.to_dict(
        tiny_vqa.recipe(
            folder,
            run_dir=str(folder / name),
            engine={"deepspeed": f"ds_configs/zero{stage}.json", "dtype": "float32"},
            optim={"epochs": 1, "max_steps": steps, "warmup": 0.0, "schedule": "constant"},
        )
    )
    raw["method"] = {"name": "lora", "r": 2, "init_lora_weights": start}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def ok(script: str, *args: str, ranks: int) -> str:
    result = launch.run(script, *args, ranks=ranks, timeout=600)
    assert result.code == 0, result.tail()
    return result.output


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_a_run_is_evaluated_and_goes_on_with_the_start_and_the_ranks_that_it_was_given(tmp_path, start):
    tiny_vqa.prepare(tmp_path)
    ok(SCRIPT, write(tmp_path, "once", start, 0, 6), write(tmp_path, "parts", start, 0, 3), ranks=1)
    config = json.loads((tmp_path / "parts" / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] if start == "eva" else config["r"] == 4, "no other rank, so nothing is tried"
    best = json.loads((tmp_path / "parts" / "adapter" / "metrics.json").read_text())["best"]
    ok("launchers/evaluate.py", "--run", str(tmp_path / "parts"), "--checkpoint", "last", "--split", "val", ranks=1)
    scores = json.loads(next((tmp_path / "parts").glob("evaluation*.json")).read_text())
    assert str(best) in json.dumps(scores)
    ok(SCRIPT, write(tmp_path, "parts", start, 2, 6), write(tmp_path, "two", start, 1, 6), ranks=2)
    for name in ("parts", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "once"), abs=1e-5)
