"""kill -9 of ranks and loader workers at random moments, also while a checkpoint is written: the same command, given
again and again, ends with the curve and the adapter of a run that nobody touched.

MMPEFT_KILLS: kills of each kind of run, 2 where it is not set. MMPEFT_SEED: of the draw, printed with every kill."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, kills, launch
from tests.helpers.runs import endless, tiny_kinds

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.alone]
TRAIN = ROOT / "launchers" / "train.py"
KILLS = int(os.environ.get("MMPEFT_KILLS", 2))
SEED = int(os.environ.get("MMPEFT_SEED", 0))


def train(recipe: Path, run: Path, kill: kills.Kill | None = None, *sets: str) -> launch.Result:
    words = [word for one in (f"run_dir={run}", *sets) for word in ("--set", one)]
    return kills.run(kill, run, TRAIN, "--recipe", str(recipe), *words)


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
            kills.check_same(run, tmp_path / "untouched", tiny_kinds.STEPS)
            shutil.rmtree(run)
            ends += 1
    result = train(recipe, run)
    assert result.code == 0, result.tail()
    kills.check_same(run, tmp_path / "untouched", tiny_kinds.STEPS)
    print(f"seed {SEED}, {kind}: {count} kills, {ends + 1} runs to the end")


def without_end(folder: Path) -> Path:
    """A recipe whose length does not change its curve."""
    recipe = endless.prepare(folder)
    raw = yaml.safe_load(recipe.read_text())
    raw["data"]["workers"] = 1
    raw["optim"] |= {"warmup": 0.0, "schedule": "constant"}
    recipe.write_text(yaml.safe_dump(raw))
    return recipe


def check_to_an_end(recipe: Path, run: Path, untouched: Path) -> None:
    """Let a run go on for some steps and end, and compare it with one of as many steps."""
    steps = endless.steps_of(run)[-1] + 3
    for place in (run, untouched):
        done = train(recipe, place, None, f"optim.max_steps={steps}")
        assert done.code == 0, done.tail()
    kills.check_same(run, untouched, steps)


def test_a_run_whose_loader_workers_are_killed_ends_in_a_line_and_goes_on(tmp_path):
    recipe, run = without_end(tmp_path), tmp_path / "run"
    for _ in range(max(1, KILLS // 2)):
        kill = kills.Kill("loading", "worker", 0.0)
        result = train(recipe, run, kill)
        print(kill, result.codes, result.tail(3))
        assert kill.done and not result.killed and "Traceback" not in result.output, result.tail()
        assert "a loader process of this rank was killed" in result.output and result.codes[-1] == 2, result.tail()
    check_to_an_end(recipe, run, tmp_path / "untouched")


def test_a_run_whose_launcher_is_killed_ends_by_itself_and_goes_on(tmp_path):
    recipe, draw, run = without_end(tmp_path), random.Random(SEED), tmp_path / "run"
    for _ in range(max(1, KILLS // 2)):
        steps = max(endless.steps_of(run), default=0) + draw.randint(1, 20)
        with launch.Launch(TRAIN, "--recipe", str(recipe)) as launched:
            endless.reach(run, steps, lambda: bool(launched.members()))  # noqa: B023
            victim = draw.choice([launched.process, launched.ranks()[0].parent()])
            print(f"seed {SEED}: step {steps}, {'deepspeed' if victim is launched.process else 'launch.py'}")
            victim.kill()
            result = launched.wait(300)
        assert not result.killed and "Traceback" not in result.output, result.tail()
    check_to_an_end(recipe, run, tmp_path / "untouched")
