"""A stop during the last evaluation loses no step: what is due is saved before it, and it ends within a step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.files import REPOSITORY
from tests.helpers import launch
from tests.helpers.runs import tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
STEPS, VALIDATION = 2, 1000
LIMIT = 240.0  # seconds a launch may take on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two steps of training, and an evaluation of more than a hundred."""
    path = tmp_path_factory.mktemp("stop")
    tiny_vqa.prepare(path)
    statistics = Manifest.load(path / "data").statistics
    shutil.rmtree(path / "data")
    manifest = tiny_vqa.write_data(path / "data", train=12, val=VALIDATION, per_shard=500)
    manifest.statistics = statistics
    manifest.save(path / "data")
    return path


def arguments(folder: Path, *sets: str) -> list[str]:
    given = ["optim.epochs=1", *sets]
    return ["--recipe", str(folder / "recipe.yaml"), *(word for s in given for word in ("--set", s))]


def test_sigterm_during_the_last_evaluation_loses_no_step(folder):
    train, run = REPOSITORY / "launchers" / "train.py", folder / "run"
    latest = run / "checkpoints" / "latest"
    with launch.Launch(train, *arguments(folder), ranks=2) as launched:
        end = time.monotonic() + LIMIT
        while not latest.exists() and time.monotonic() < end and launched.members():
            time.sleep(0.02)
        assert latest.exists(), launched.output
        os.killpg(launched.session, signal.SIGTERM)
        result = launched.wait(60)
    assert not result.killed and "Traceback" not in result.output, result.tail()
    assert "accuracy" not in result.output, "the evaluation was over before the signal came"
    assert f"stopped after step {STEPS} of {STEPS}" in result.output and not (run / "finished.json").exists()
    assert latest.read_text().strip() == f"step-{STEPS:08d}"

    # The same command makes up for the evaluation alone.
    before = (run / "metrics.jsonl").read_bytes()
    result = launch.run_forked(train, *arguments(folder), timeout=LIMIT)
    assert result.code == 0 and "accuracy" in result.output, result.tail()
    assert (run / "metrics.jsonl").read_bytes() == before and (run / "finished.json").exists()
    assert (
        json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "evaluated.json").read_text())["state"]["best"]
        is not None
    )
