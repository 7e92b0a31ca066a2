"""Every pair of {1, 2, 3, 4 ranks} x {ZeRO 0, 1, 2, 3}: what one has saved the other continues, on the same samples
and with the losses of a run that nothing has changed. Prints the table of docs/reliability.md."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.train_recipes"
SETTINGS = list(product((1, 2, 3, 4), (0, 1, 2, 3)))  # ranks, ZeRO stage
SAVED, STEPS = 3, 5
KEYS = ("step", "epoch", "sample_keys_hash", "weight")


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("elastic")
    tiny_vqa.prepare(path)
    return path


def recipe(folder: Path, run: str, stage: int, steps: int) -> str:
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    raw["run_dir"] = str(folder / run)
    raw["data"]["validation"] = []
    raw["optim"] |= {"max_steps": steps, "warmup": 0.0, "schedule": "constant"}
    raw["engine"]["deepspeed"] = f"ds_configs/zero{stage}.json"
    raw["monitor"]["tensorboard"] = False
    path = folder / f"{run}-{steps}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def train(recipes: list[str], ranks: int) -> None:
    done = launch.run_forked(SCRIPT, *recipes, ranks=ranks, timeout=1200.0)
    assert done.code == 0 and not done.killed, done.tail()


@pytest.fixture(scope="module")
def untouched(folder) -> list[dict]:
    train([recipe(folder, "untouched", 0, 18)], 1)
    return rows(folder / "untouched")


def check(run: Path, untouched: list[dict], steps: int) -> float:
    """Largest difference between the losses of a run and those of the untouched one."""
    found, expected = rows(run), untouched[:steps]
    assert [[row[key] for key in KEYS] for row in found] == [[row[key] for key in KEYS] for row in expected]
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(found, expected, strict=True))


def test_every_pair_continues_the_same_curve(folder, untouched):
    for ranks in (1, 2, 3, 4):
        train([recipe(folder, f"{ranks}-{stage}", stage, SAVED) for stage in range(4)], ranks)
    largest: dict[tuple, float] = {}
    for ranks in (1, 2, 3, 4):
        pairs = {}
        for (r, s), stage in product(SETTINGS, range(4)):
            run = f"{r}-{s} to {ranks}-{stage}"
            shutil.copytree(folder / f"{r}-{s}", folder / run)
            pairs[(r, s), (ranks, stage)] = folder / run, recipe(folder, run, stage, STEPS)
        train([path for _, path in pairs.values()], ranks)
        largest |= {pair: check(run, untouched, STEPS) for pair, (run, _) in pairs.items()}
    print("\n| from \\ to |", " | ".join(f"{r}x{s}" for r, s in SETTINGS), "|\n|---|" + "---|" * len(SETTINGS))
    for one in SETTINGS:
        print(f"| {one[0]}x{one[1]} |", " | ".join(f"{largest[one, other] * 1e7:.1f}" for other in SETTINGS), "|")
    assert len(largest) == 256 and max(largest.values()) <= 1e-5


def test_one_run_goes_through_all_of_them(folder, untouched):
    """A step in each setting, in an order in which both change nearly every time; the differences do not add up."""
    for step, i in enumerate(range(0, 16 * 5, 5), 1):
        ranks, stage = SETTINGS[i % 16]
        done = launch.run_forked(
            ROOT / "launchers" / "train.py", "--recipe", recipe(folder, "walk", stage, step), ranks=ranks
        )
        assert done.code == 0, done.tail()
    worst = check(folder / "walk", untouched, 16)
    print(f"16 settings in one run: {worst:.1e}")
    assert worst <= 1e-5
