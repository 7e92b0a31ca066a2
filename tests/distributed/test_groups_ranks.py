"""Learning rates by part, LoRA+ and Muon, on two ranks at ZeRO-1 and 3, also stopped and continued by one rank."""

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
OPTIM = {
    "groups": {"groups": {"*.lora_B.*": {"lr": 0.05}, "*modules_to_save*weight": {"lr": 0.002, "weight_decay": 0.3}}},
    "plus": {"lora_plus": 8.0},
    "muon": {"name": "muon", "muon": {"adamw_lr": 0.004}, "groups": {"*modules_to_save*": {"optimizer": "muon"}}},
    "plain": {},
}
STEPS = 6


CASES = [(optim, stage) for optim in ("groups", "plus", "muon") for stage in (1, 3)] + [("muon", 2)]


def write(folder: Path, name: str, optim: str, stage: int, steps: int = STEPS) -> str:
    raw = recipes.to_dict(
        tiny_vqa.recipe(
            folder,
            run_dir=str(folder / name),
            engine={"deepspeed": f"ds_configs/zero{stage}.json", "dtype": "float32"},
            optim={"max_steps": steps, "schedule": "constant", "warmup": 0.0, **OPTIM[optim]},
            data={"validation": []},
        )
    )
    raw["method"] = {"name": "lora", "r": 2}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def train(ranks: int, *paths: str) -> None:
    result = launch.run_forked(SCRIPT, *paths, ranks=ranks)
    assert result.code == 0, result.tail()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("groups")
    tiny_vqa.prepare(path)
    train(1, *(write(path, optim, optim, 0) for optim in OPTIM))
    train(
        2,
        *(write(path, f"{optim} {stage}", optim, stage) for optim, stage in CASES),
        *(write(path, f"{optim} {stage} in parts", optim, stage, STEPS // 2) for optim, stage in CASES),
    )
    train(1, *(write(path, f"{optim} {stage} in parts", optim, 4 - stage) for optim, stage in CASES))
    return path


def losses(folder: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parts", ["", " in parts"])
@pytest.mark.parametrize(("optim", "stage"), CASES)
def test_two_ranks_train_as_one_and_another_stage_goes_on(folder, optim, stage, parts):
    found = losses(folder, f"{optim} {stage}{parts}")
    assert len(found) == STEPS and found == pytest.approx(losses(folder, optim), abs=1e-5)


def test_the_rates_are_other_ones(folder):
    """Negative control: with one rate for all, losses are others from the second step on."""
    for optim in ("groups", "plus", "muon"):
        pairs = zip(losses(folder, optim)[1:], losses(folder, "plain")[1:], strict=True)
        assert all(abs(one - other) > 1e-3 for one, other in pairs)
