"""Curves cut to a checkpoint's step: lines of metrics.jsonl and points on TensorBoard."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpeft_ds.engine import board, rundir
from mmpeft_ds.engine.evaluator import Evaluation
from mmpeft_ds.engine.monitor import Monitor
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.recipe.options import MonitorOptions
from tests.helpers.runs.run_directories import RECIPE, write_events


def test_lost_lines_of_the_curves_are_said_and_the_last_one_is_kept_for_the_table(tmp_path, caplog):
    run = RunDir.open(tmp_path / "a", RECIPE)
    run.metrics_path.write_text("".join(json.dumps({"step": s, "loss": 0.5}) + "\n" for s in (1, 2, 5, 6)))
    assert run.truncate(5) == {"step": 5, "loss": 0.5}
    assert "the lines of 2 steps are lost (3, 4)" in caplog.text
    run.close()


def test_truncate_cuts_metrics_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (1, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    rundir.truncate_jsonl(path, 3)
    assert path.read_text() == "".join(lines[:3])
    path.write_text("".join(lines[:2]) + '{"step": 2')
    rundir.truncate_jsonl(path, 3)
    assert path.read_text() == "".join(lines[:2])


def points(folder: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    shown = EventAccumulator(str(folder))
    shown.Reload()
    return [(e.step, e.value) for e in shown.Scalars("loss")] if "loss" in shown.Tags()["scalars"] else []


def test_truncate_leaves_no_stale_point_on_tensorboard(tmp_path):
    run = RunDir.open(tmp_path / "a", RECIPE)
    write_events(run.tensorboard, range(1, 8), 1.0)
    assert points(run.tensorboard)[-1] == (7, 1.0)
    run.truncate(4)
    assert points(run.tensorboard) == [(s, 1.0) for s in (1, 2, 3, 4)]
    write_events(run.tensorboard, range(5, 7), 2.0)
    assert points(run.tensorboard) == [(s, 1.0) for s in (1, 2, 3, 4)] + [(5, 2.0), (6, 2.0)]
    before = {p.name: p.read_bytes() for p in run.tensorboard.iterdir()}
    run.truncate(6)
    assert {p.name: p.read_bytes() for p in run.tensorboard.iterdir()} == before
    run.close()


# In names of event files, by which they are read in order: a new process starts in a later second than the last one.
# Within a second a number of the process decides, as text, so that its tenth file comes before its ninth.
SECONDS = itertools.count(1_700_000_000)


def monitored(folder: Path, start: int, steps: range, loss: float, score: float, again: bool = False) -> None:
    """What one process writes: `steps`, and an evaluation after the last of them; `again`: first one at `start`."""
    second = next(SECONDS)
    with mock.patch.object(board, "time", SimpleNamespace(time=lambda: second)):
        monitor = Monitor(folder, MonitorOptions(), 9, start, "seed: 7")
    evaluation = Evaluation({"accuracy": score}, [], [(torch.rand(3, 8, 8), [])])
    if again:
        monitor.evaluation("val", start, evaluation)
    for step in steps:
        row = {
            "step": step,
            "epoch": 0,
            "loss": loss,
            "lr": 1.0,
            "samples_per_second": 1.0,
            "grad_norms": {},
            "bad": {},
        }
        monitor.step(row | {"rss_mib": [1.0], "grad_norm": 1.0})
    monitor.evaluation("val", steps[-1], evaluation)
    monitor.close()


def slowly(reader: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows without its fast loader."""
    reader.Reload()
    shown = {tag: [(e.step, round(e.value, 3)) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    shown["pictures"] = [(e.step, 0.0) for e in reader.Images("predictions/val")]
    return {tag: shown[tag] for tag in ("train/loss", "eval/val/accuracy", "pictures")}


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_resumed_run_has_one_point_a_step_also_in_a_tensorboard_that_was_open(tmp_path, evaluated):
    """Killed after step 6, continued from the checkpoint of step 4, whose evaluation is known there or made again."""
    run = RunDir.open(tmp_path / "a", RECIPE)
    monitored(run.path, 0, range(1, 5), 1.0, 0.1)
    monitored(run.path, 4, range(5, 7), 2.0, 0.2)
    open_since_before = EventAccumulator(str(run.tensorboard), size_guidance={"images": 0})
    assert slowly(open_since_before)["train/loss"][-1] == (6, 2.0)
    run.truncate(4, evaluated)
    monitored(run.path, 4, range(5, 8), 3.0, 0.3, again=not evaluated)
    anew = slowly(EventAccumulator(str(run.tensorboard), size_guidance={"images": 0}))
    assert anew == {
        "train/loss": [*((step, 1.0) for step in range(1, 5)), *((step, 3.0) for step in range(5, 8))],
        "eval/val/accuracy": [(4, 0.1 if evaluated else 0.3), (7, 0.3)],
        "pictures": [(4, 0.0), (7, 0.0)],
    }
    if evaluated:
        assert slowly(open_since_before) == anew
    run.truncate(0)  # as after a death before the first checkpoint: the recipe is written again
    assert EventAccumulator(str(run.tensorboard)).Reload().Tags()["tensors"] == []
    run.close()


def test_truncate_survives_an_event_file_cut_by_a_kill(tmp_path):
    run = RunDir.open(tmp_path / "a", RECIPE)
    write_events(run.tensorboard, range(1, 6), 1.0)
    (path,) = run.tensorboard.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    run.truncate(9)
    assert points(run.tensorboard) == [(s, 1.0) for s in (1, 2, 3, 4)]
    run.truncate(0)
    assert points(run.tensorboard) == []
    run.close()
