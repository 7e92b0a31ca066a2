"""What may befall a run directory between two starts: damage of its newest checkpoint, another place, a name with
spaces, a clock that went back, a second start beside the first. The run continues exactly, or is refused in one line.

MMPEFT_DAMAGES: damages of each file of a checkpoint, 40 where it is not set. MMPEFT_SEED: of the draw."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmpeft_ds.engine import checkpoint, checkpoint_files
from tests.helpers import ROOT, kills, launch, rank_server
from tests.helpers.runs import endless, tiny_kinds

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.alone]
TRAIN = ROOT / "launchers" / "train.py"
DAMAGES = int(os.environ.get("MMPEFT_DAMAGES", 40))
SEED = int(os.environ.get("MMPEFT_SEED", 0))


def train(folder: Path, run: Path, kill: kills.Kill | None = None) -> launch.Result:
    return kills.run(kill, run, TRAIN, "--recipe", str(folder / "recipe.yaml"), "--set", f"run_dir={run}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With an untouched run, and one that was killed between its checkpoints and its end."""
    path = tmp_path_factory.mktemp("directory")
    tiny_kinds.prepare(path, "bfloat16")
    done = train(path, path / "untouched")
    assert done.code == 0, done.tail()
    kill = kills.Kill("stepping", "all ranks", 6.0)
    train(path, path / "killed", kill)
    assert kill.done and len(checkpoint_files.listing(path / "killed" / "checkpoints")) > 1
    return path


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut anywhere, or with one byte changed."""
    at = draw.randrange(len(content))
    if draw.random() < 0.3:
        return content[:at]
    return content[:at] + bytes([content[at] ^ draw.randint(1, 255)]) + content[at + 1 :]


def test_any_damage_of_the_newest_checkpoint_leads_to_the_one_before_it_in_one_line(folder, tmp_path, caplog):
    run, draw, noticed = tmp_path / "run", random.Random(SEED), 0
    shutil.copytree(folder / "killed", run)
    newest, before, *_ = checkpoint_files.listing(run / "checkpoints")
    (run / "checkpoints" / "latest").write_text(newest.name)
    names = sorted(path for path in newest.iterdir() if path.name != "evaluated.json")
    for path in names:
        content = path.read_bytes()
        for _ in range(DAMAGES):
            path.write_bytes(wrong := damaged(content, draw))
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                taken = checkpoint.newest_valid(run)
            if path.name == checkpoint_files.CHECKSUMS and taken == newest:
                assert len(wrong) > len(content) - 3, wrong  # white space after or between what it says
                continue
            assert taken == before, f"seed {SEED}: {path.name}"
            (line,) = caplog.messages
            assert newest.name in line and before.name in line
            noticed += 1
        path.write_bytes(content)
    print(f"seed {SEED}: {noticed} of {DAMAGES * len(names)} damages of {len(names)} files led to {before.name}")
    assert checkpoint.newest_valid(run) == newest


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one_to_the_bit(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "killed", run)
    weights = checkpoint_files.listing(run / "checkpoints")[0] / "weights.safetensors"
    weights.write_bytes(damaged(weights.read_bytes(), random.Random(SEED)))
    done = train(folder, run)
    assert done.code == 0 and done.output.count("is damaged: weights.safetensors") == 1, done.tail()
    kills.check_same(run, folder / "untouched", tiny_kinds.STEPS)


def test_a_run_goes_on_at_another_place_whose_name_has_spaces_after_the_clock_went_back(folder, tmp_path):
    run = tmp_path / "another place" / "the run"
    shutil.copytree(folder / "killed", run)
    tomorrow = time.time() + 86_400
    for path in (run, *run.rglob("*")):
        os.utime(path, (tomorrow, tomorrow))
    done = train(folder, run)
    assert done.code == 0 and "continues after step" in done.output, done.tail()
    kills.check_same(run, folder / "untouched", tiny_kinds.STEPS)


def test_a_run_whose_curve_and_lock_are_removed_ends_like_one_that_nobody_touched(folder, tmp_path):
    run, removed = tmp_path / "run", []

    def remove() -> None:
        endless.reach(run, 3, lambda: True)
        for name in ("metrics.jsonl", ".lock"):
            (run / name).unlink()
            removed.append(name)

    beside = threading.Thread(target=remove)
    beside.start()
    done = train(folder, run)
    beside.join()
    assert done.code == 0 and len(removed) == 2, done.tail()
    assert "metrics.jsonl was removed or replaced" in done.output
    kills.check_same(run, folder / "untouched", tiny_kinds.STEPS)


@pytest.mark.parametrize("unlocked", [False, True])
def test_a_second_start_in_the_directory_of_a_living_run_is_refused_and_the_run_goes_on(tmp_path, unlocked):
    recipe, run, second = endless.prepare(tmp_path), tmp_path / "run", []

    def start_again() -> None:
        endless.reach(run, 3, lambda: True)
        if unlocked:
            (run / ".lock").unlink()
            endless.reach(run, max(endless.steps_of(run)) + 2, lambda: True)
        command = [sys.executable, str(TRAIN), "--recipe", str(recipe)]
        second.append(subprocess.run(command, env=launch.environment(), capture_output=True, text=True, timeout=300))
        before = max(endless.steps_of(run))
        endless.reach(run, before + 3, lambda: True)
        rank_server.ranks()[0].terminate()

    beside = threading.Thread(target=start_again)
    beside.start()
    first = launch.run_forked(TRAIN, "--recipe", str(recipe), timeout=500.0)
    beside.join()
    assert first.code == 0 and "stopped after step" in first.output, first.tail()
    assert second[0].returncode == 2 and "another run is writing here" in second[0].stderr, second[0].stderr
    assert "Traceback" not in second[0].stderr
    steps = endless.steps_of(run)
    assert steps == list(range(1, len(steps) + 1))
