"""Two tasks one after the other: what elastic weight consolidation keeps, and the launcher that prepares it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpeft_ds import adapter
from mmpeft_ds.engine.assembly.forward import forward
from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.ewc_tasks"
# The answer follows from the question; for the second task it is another one.
TASKS = {"a": lambda i, k: k, "b": lambda i, k: k + 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ewc_tasks")
    tiny_vqa.prepare(path)
    statistics = json.loads((path / "data" / "manifest.json").read_text())["statistics"]
    for task, answer in TASKS.items():
        manifest = tiny_vqa.write_data(path / f"data_{task}", answer=answer)
        manifest.statistics = statistics
        manifest.save(path / f"data_{task}")
    result = launch.run_forked(SCRIPT, str(path), ranks=2)
    assert result.code == 0, result.tail()
    assert "OVERFLOW" not in result.output
    return path


@pytest.fixture(scope="module")
def losses(folder) -> dict[str, dict[str, float]]:
    """Loss of each run on each task."""
    return {run: {task: loss(folder, run, answer) for task, answer in TASKS.items()} for run in ("a", "free", "held")}


@torch.no_grad()
def loss(folder: Path, run: str, answer) -> float:
    loaded = adapter.load(folder / f"run_{run}" / "adapter")
    batch = loaded.batch([tiny_vqa.png(i) for i in range(12)], [tiny_vqa.QUESTIONS] * 12)
    labels = torch.tensor([answer(i, k) % 4 for i in range(12) for k in range(len(tiny_vqa.QUESTIONS))])
    return torch.nn.functional.cross_entropy(forward(loaded.model, loaded.backbone, batch).logits, labels).item()


def rows(folder: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def test_with_ewc_the_second_task_costs_the_first_less(losses):
    assert losses["free"]["a"] > losses["a"]["a"] + 0.4, "the second task does not even disturb the first"
    assert losses["held"]["a"] < losses["free"]["a"] - 0.3
    assert losses["held"]["b"] < losses["free"]["b"] + 0.2 < losses["a"]["b"], "held so fast that it learns nothing"


def test_runs_start_at_the_optimum_and_tell_the_penalty(folder):
    for run in ("run_free", "run_held"):
        assert rows(folder, run)[0]["ewc_penalty"] == 0  # theta is theta*
    assert rows(folder, "run_held")[-1]["ewc_penalty"] > 0
    assert not any(row["ewc_penalty"] for row in rows(folder, "run_free"))  # strength 0
    assert "ewc_penalty" not in rows(folder, "run_a")[0]
    board = EventAccumulator(str(folder / "run_held" / "tensorboard")).Reload()
    curve = [event.value for event in board.Scalars("train/ewc_penalty")]
    assert curve == pytest.approx([row["ewc_penalty"] for row in rows(folder, "run_held")], rel=1e-5)


def test_one_process_writes_the_file_of_two_ranks(folder):
    out = folder / "fisher_one_rank.safetensors"
    command = [sys.executable, ROOT / "launchers" / "fisher.py", "--run", folder / "run_a", "--out", out]
    weight = ["--weight", "*head*=0.5", "--weight", "*=1"]
    done = subprocess.run([*command, *weight], capture_output=True, text=True, timeout=120, env=launch.environment())
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = load_file(out), load_file(folder / "fisher_two_ranks.safetensors")
    assert list(one) == list(two)
    heads = 0
    for name, tensor in two.items():
        half = name.startswith("fisher.") and "head" in name
        heads += half
        wanted = tensor * 0.5 if half else tensor
        allowed = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(one[name], wanted, rtol=0, atol=allowed + 1e-9, msg=name)
    assert heads
    with safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["batches"] == 3 and facts["split"] == "train" and facts["weights"][0] == ["*head*", 0.5]
