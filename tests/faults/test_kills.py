"""kill -9 of ranks and loader workers at random moments, also while a checkpoint is written: the same command, given
again and again, ends with the curve and the adapter of a run that nobody touched.

MMPEFT_KILLS: kills of each kind of run, 2 where it is not set. MMPEFT_SEED: of the draw, printed with every kill."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.helpers import ROOT, kills
from tests.helpers.runs import tiny_kinds

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.alone]
TRAIN = ROOT / "launchers" / "train.py"
KILLS = int(os.environ.get("MMPEFT_KILLS", 2))
SEED = int(os.environ.get("MMPEFT_SEED", 0))
EXACT = ("step", "epoch", "loss", "lr", "grad_norm", "sample_keys_hash", "weight")


def curve(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in EXACT) for row in rows]


def check_same(run: Path, untouched: Path) -> None:
    assert curve(run) == curve(untouched) and len(curve(run)) == tiny_kinds.STEPS
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (untouched / "adapter" / name).read_bytes()
    assert not kills.partial(run), "what a killed run was writing is removed"


def train(recipe: Path, run: Path, kill: kills.Kill | None = None) -> kills.launch.Result:
    return kills.run(kill, run, TRAIN, "--recipe", str(recipe), "--set", f"run_dir={run}")


@pytest.mark.parametrize("kind", tiny_kinds.KINDS)
def test_a_run_that_is_killed_at_random_moments_ends_like_one_that_is_not(tmp_path, kind):
    recipe, draw = tiny_kinds.prepare(tmp_path, kind), random.Random(f"{SEED} {kind}")
    done = train(recipe, tmp_path / "untouched")
    assert done.code == 0, done.tail()
    run, count, ends = tmp_path / "run", 0, 0
    while count < KILLS:
        kill = kills.Kill.drawn(draw)
        result = train(recipe, run, kill)
        count += kill.done
        print(f"seed {SEED}, {kind}, {count} of {KILLS}: {kill} codes {result.codes}")
        assert not result.killed and "Traceback" not in result.output, result.tail()
        if result.code == 0:
            check_same(run, tmp_path / "untouched")
            shutil.rmtree(run)
            ends += 1
    result = train(recipe, run)
    assert result.code == 0, result.tail()
    check_same(run, tmp_path / "untouched")
    print(f"seed {SEED}, {kind}: {count} kills, {ends + 1} runs to the end")
