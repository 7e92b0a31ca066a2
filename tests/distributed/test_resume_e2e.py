"""Runs of launchers/train.py that are killed, stopped and continued end like a run that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.helpers import ROOT, kills, launch, rank_server
from tests.helpers.runs import endless, tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
TRAIN = ROOT / "launchers" / "train.py"
EXACT = ("step", "epoch", "loss", "lr", "grad_norm", "sample_keys_hash", "weight")
STEPS = 45  # nine epochs of five steps: a rank may take half a second, many steps, to notice that its launcher died
LIMIT = 240.0  # seconds a launch may take on a busy machine
GRACE = "engine.stop_grace=120"  # a clean stop on a busy machine


def arguments(folder: Path, run: str, *sets: str) -> list[str]:
    given = [f"run_dir={folder / run}", *sets]
    return ["--recipe", str(folder / "recipe.yaml"), *(word for s in given for word in ("--set", s))]


def rows(folder: Path, run: str) -> list[dict]:
    path = folder / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(folder: Path, run: str, steps: int, launched: launch.Launch) -> None:
    """Wait until the launch has done `steps` steps more than the run had when this was called."""
    step = len(rows(folder, run)) + steps
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and launched.members():
        path = folder / run / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= step:  # a line a step
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached:\n{launch.Result(-1, launched.output).tail()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    tiny_vqa.prepare(path)
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    recipe["optim"]["epochs"] = STEPS // 5
    recipe["engine"]["save_every"] = 2
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def untouched(folder) -> list[dict]:
    result = launch.run_forked(TRAIN, *arguments(folder, "untouched"))
    assert result.code == 0 and not result.killed, result.tail()
    return rows(folder, "untouched")


@pytest.fixture(scope="module")
def killed(folder, untouched) -> Path:
    """State of a run after kill -9 of rank 1 beyond step 5; copies of it are continued by the tests."""
    kill = kills.Kill("stepping", "rank 1", 5.0)
    result = kills.run(kill, folder / "killed", TRAIN, *arguments(folder, "killed"))
    assert kill.done and not result.killed and 0 not in result.codes, result.tail()
    assert "Traceback" not in result.output, result.tail()  # the other rank says in a line that it lost one
    assert not (folder / "killed" / "finished.json").exists()
    return folder / "killed"


def continued(folder: Path, killed: Path, name: str, *sets: str, ranks: int) -> list[dict]:
    shutil.copytree(killed, folder / name)
    result = launch.run_forked(TRAIN, *arguments(folder, name, *sets), ranks=ranks)
    assert result.code == 0 and not result.killed, result.tail()
    return rows(folder, name)


def exact(found: list[dict]) -> list[tuple]:
    return [tuple(row[key] for key in EXACT) for row in found]


def test_the_untouched_run_did_all_steps(untouched):
    assert [row["step"] for row in untouched] == list(range(1, STEPS + 1))


def test_killed_then_stopped_twice_continues_to_the_bit(folder, untouched, killed):
    """kill -9 of a rank, then SIGTERM to `deepspeed` alone, then SIGTERM to the ranks and workers, then to the end."""
    run = "stopped"
    shutil.copytree(killed, folder / run)
    # to the launcher alone: it dies of it, and its ranks have to notice
    with launch.Launch(TRAIN, *arguments(folder, run, GRACE), ranks=2) as launched:
        wait_for_steps(folder, run, 2, launched)
        launched.process.send_signal(signal.SIGTERM)
        result = launched.wait(LIMIT)
    assert result.code == -signal.SIGTERM and not result.killed, result.tail()
    assert_stopped_cleanly(folder / run, result)
    assert " is gone)" in result.output, result.tail()
    # to every rank with its loader processes; test_stop_in_evaluation.py has the group of a launcher
    result = stopped_with_its_workers(folder, run)
    assert not result.killed and not any(result.codes), result.tail()
    assert_stopped_cleanly(folder / run, result)
    stopped_at = rows(folder, run)[-1]["step"]
    result = launch.run_forked(TRAIN, *arguments(folder, run))
    assert result.code == 0, result.tail()
    assert f"continues after step {stopped_at} of {STEPS}, on 2 ranks" in result.output
    assert exact(rows(folder, run)) == exact(untouched)
    ours, theirs = (load_file(folder / r / "adapter" / "adapter_model.safetensors") for r in (run, "untouched"))
    assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)


def stopped_with_its_workers(folder: Path, run: str) -> launch.Result:
    step = rows(folder, run)[-1]["step"] + 2

    def stop() -> None:
        endless.reach(folder / run, step, lambda: True, LIMIT)
        for rank in rank_server.ranks():
            os.killpg(rank.pid, signal.SIGTERM)

    beside = threading.Thread(target=stop)
    beside.start()
    result = launch.run_forked(TRAIN, *arguments(folder, run, GRACE, "data.workers=1"), timeout=LIMIT)
    beside.join()
    return result


def assert_stopped_cleanly(run: Path, result: launch.Result) -> None:
    """The last step that was done is saved, and no traceback was printed."""
    assert "Traceback" not in result.output, result.tail()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (run / "checkpoints" / "latest").read_text().strip().split(".")[0] == f"step-{last:08d}"
    assert last < STEPS and f"stopped after step {last}" in result.output


@pytest.mark.parametrize(("ranks", "stage"), [pytest.param(1, 3, marks=pytest.mark.slow), (3, 1)])
def test_other_rank_counts_and_stages_continue_the_same_curve(folder, untouched, killed, ranks, stage):
    found = continued(folder, killed, f"{ranks}-{stage}", f"engine.deepspeed=ds_configs/zero{stage}.json", ranks=ranks)
    assert [row["step"] for row in found] == [row["step"] for row in untouched]
    assert [row["sample_keys_hash"] for row in found] == [row["sample_keys_hash"] for row in untouched]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in untouched], abs=1e-5)


def test_a_finished_run_prints_its_table_and_ends_well(folder, untouched):
    before = (folder / "untouched" / "metrics.jsonl").read_bytes()
    result = launch.run_forked(TRAIN, *arguments(folder, "untouched"), ranks=0)
    assert result.code == 0 and "train_loss" in result.output, result.tail()
    assert (folder / "untouched" / "metrics.jsonl").read_bytes() == before


def test_another_recipe_is_refused_with_the_keys_that_differ(folder, killed):
    result = launch.run_forked(TRAIN, *arguments(folder, "killed", "optim.lr=0.5", "data.workers=1"), ranks=0)
    assert result.code == 2, result.tail()
    last = result.output.strip().splitlines()[-1]
    assert "optim.lr: 0.01 -> 0.5" in last and "data.workers" not in last and "Traceback" not in result.output


def test_a_flipped_bit_in_a_frozen_weight_is_noticed(folder, killed):
    weights = folder / "text" / "model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    name = "encoder.layer.0.output.dense.weight"
    tensors[name].view(torch.int32)[3, 4] ^= 1  # the last bit of one mantissa
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        shutil.copytree(killed, folder / "flipped")
        result = launch.run_forked(TRAIN, *arguments(folder, "flipped"), ranks=0)
    finally:
        weights.write_bytes(before)
    assert result.code == 2, result.tail()
    assert f"frozen weight text_model.{name} is" in result.output and "Traceback" not in result.output
