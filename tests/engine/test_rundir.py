"""The run directory: one live owner, continued or refused with the differing keys, cut to the checkpoint's step."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.engine import board, checkpoint, checkpoint_files, identities, run_lock, rundir
from mmpeft_ds.engine.evaluator import Evaluation
from mmpeft_ds.engine.monitor import Monitor
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import CannotWrite, save_tensors, write_json
from mmpeft_ds.recipe.options import MonitorOptions
from tests.helpers import ROOT
from tests.helpers.data import tiny_features
from tests.helpers.runs.checkpoint_header import header

RECIPE = {
    "run_dir": "runs/a",
    "seed": 0,
    "optim": {"lr": 1e-3, "epochs": 1, "max_steps": 0, "betas": (0.9, 0.999)},
    "engine": {"deepspeed": "ds_configs/zero3.json", "dtype": "float32", "eval_every": 0},
    "data": {
        "workers": 2,
        "global_batch": 8,
        "max_bad_fraction": 0.001,
        "sources": [{"dir": "data/a", "weight": 1.0}],
    },
    "monitor": {"every": 1},
}


def changed(**keys) -> dict:
    """RECIPE with `section__key=value`."""
    recipe = copy.deepcopy(RECIPE)
    for key, value in keys.items():
        section, _, name = key.partition("__")
        recipe[section] = {**recipe[section], name: value} if name else value
    return recipe


def started(path: Path) -> None:
    """A run with one checkpoint, closed."""
    run = RunDir.open(path, RECIPE)
    writers = {
        "state.json": lambda p: write_json(p, header()),
        "recipe.json": lambda p: checkpoint.write_json(p, RECIPE),
    }
    for name in ("weights.safetensors", "optimizer.safetensors"):
        writers[name] = lambda p: p.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    checkpoint_files.write(run.checkpoints, 5, writers, 2, False)
    run.close()


def test_a_new_run_writes_its_recipe(tmp_path):
    run = RunDir.open(tmp_path / "a", RECIPE)
    assert run.resume_from is None
    assert run.opening_words(0, 40, world_size=1, stage=3).endswith("begins, 40 steps, on 1 rank at ZeRO-3")
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["optim"]["betas"] == [0.9, 0.999]
    run.close()


def test_the_same_recipe_continues(tmp_path):
    started(tmp_path / "a")
    run = RunDir.open(tmp_path / "a", RECIPE)
    assert run.resume_from.name == "step-00000005" and run.differing == ()
    words = run.opening_words(5, 40, world_size=3, stage=1)
    assert words == f"{tmp_path / 'a'}: continues after step 5 of 40, on 3 ranks at ZeRO-1"
    run.close()


@pytest.mark.parametrize(
    ("total", "says"),
    [
        (40, "after step 5 of 40"),
        (5, "after all its 5 steps: nothing"),
        (1, "its 5 steps, and 1 are asked for: nothing"),
    ],
)
def test_a_run_that_has_made_its_steps_is_not_said_to_train(tmp_path, total, says):
    started(tmp_path / "a")
    run = RunDir.open(tmp_path / "a", RECIPE)
    assert says in run.opening_words(5, total, world_size=1, stage=3)
    run.close()
    with mock.patch.object(rundir, "_state", lambda newest: {"step": 5}):
        assert says in rundir.preview(tmp_path / "a", RECIPE, total)[-1]


@pytest.mark.parametrize(
    "change",
    [
        {"optim__epochs": 3},
        {"optim__max_steps": 7},
        {"engine__deepspeed": "ds_configs/zero1.json"},
        {"engine__eval_every": 2},
        {"engine__adapter_matmul": "bfloat16"},
        {"data__workers": 0},
        {"data__max_bad_fraction": 0.5},
        {"data__evaluation_batch": 2},
        {"monitor__every": 5},
        {"run_dir": "elsewhere"},
    ],
)
def test_length_zero_json_workers_and_logging_may_change(tmp_path, change):
    started(tmp_path / "a")
    run = RunDir.open(tmp_path / "a", changed(**change))
    assert run.resume_from is not None and len(run.differing) == 1
    assert run.opening_words(5, 40, 2, 3).endswith(f"; changed: {run.differing[0]}")
    run.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optim__lr": 0.1}, "optim.lr: 0.001 -> 0.1"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data__global_batch": 4}, "data.global_batch: 8 -> 4"),
        ({"data__sources": [{"dir": "data/b", "weight": 1.0}]}, "data.sources.0.dir: data/a -> data/b"),
        ({"engine__dtype": "bfloat16"}, "engine.dtype: float32 -> bfloat16"),
        ({"engine__new": 1}, "engine.new: absent -> 1"),
    ],
)
def test_anything_else_is_refused_with_the_key_and_both_values(tmp_path, change, told):
    started(tmp_path / "a")
    with pytest.raises(BadInput) as refused:
        RunDir.open(
            tmp_path / "a", changed(**change, optim__epochs=9) if "optim__lr" not in change else changed(**change)
        )
    assert told in str(refused.value) and "optim.epochs" not in str(refused.value)
    RunDir.open(tmp_path / "a", RECIPE).close()  # a refused attempt leaves neither a lock nor another recipe
    assert yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())["seed"] == 0


def test_fresh_takes_a_new_directory_and_leaves_the_old_one(tmp_path):
    started(tmp_path / "a")
    before = sorted(p.name for p in (tmp_path / "a").rglob("*"))
    for expected in ("a-1", "a-2"):
        run = RunDir.open(tmp_path / "a", changed(seed=4), fresh=True)
        assert run.path == tmp_path / expected and run.resume_from is None
        run.close()
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused_and_check_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for start in (lambda path: RunDir.open(path, RECIPE), lambda path: rundir.preview(path, RECIPE, 10)):
        with pytest.raises(BadInput, match=r"file/a: .*file is a file"):
            start(tmp_path / "file" / "a")
        with pytest.raises(BadInput, match=r"run_dir /proc/run: /proc cannot be written .No such file"):
            start(Path("/proc/run"))  # where root has the permission
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryFile", mock.Mock(side_effect=PermissionError(errno.EROFS, "read-only")))
            with pytest.raises(BadInput, match="cannot be written"):
                start(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077], ids=oct)
def test_a_colleague_may_take_the_lock_where_the_umask_lets_them_write(tmp_path, umask):
    before = os.umask(umask)
    try:
        RunDir.open(tmp_path / "a", RECIPE).close()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "a").iterdir() if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask} and tmp_path / "a" / ".lock" in files


def test_a_directory_with_other_things_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(BadInput, match="not a run's"):
        RunDir.open(tmp_path / "photos", RECIPE)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file"):
        RunDir.open(tmp_path / "file", RECIPE)


def hold(path: Path, ready) -> None:
    RunDir.open(path, RECIPE)
    ready.set()
    time.sleep(60)


def owner(path: Path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=hold, args=(path, ready))
    child.start()
    assert ready.wait(30)
    return child


def test_an_adapter_directory_is_not_overwritten_by_a_run(tmp_path):
    for name in ("recipe.yaml", "adapter_config.json"):
        (tmp_path / name).touch()
    with pytest.raises(BadInput, match="is an adapter directory, which a run would overwrite"):
        RunDir.open(tmp_path, RECIPE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "recipe.yaml"]


def test_a_second_owner_is_refused_by_name_and_a_dead_one_gives_way(tmp_path, monkeypatch):
    child = owner(tmp_path / "a")
    try:
        monkeypatch.setattr(run_lock.Lock.__init__, "__defaults__", (0.2,))
        monkeypatch.setattr(run_lock.refuse_taken, "__defaults__", (0.2,))
        before = (tmp_path / "a" / ".lock").read_bytes()
        for start in (lambda: RunDir.open(tmp_path / "a", RECIPE), lambda: rundir.preview(tmp_path / "a", RECIPE, 10)):
            with pytest.raises(BadInput, match=f"another run is writing here .pid {child.pid} on "):
                start()
        assert (tmp_path / "a" / ".lock").read_bytes() == before
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
    rundir.preview(tmp_path / "a", RECIPE, 10)
    RunDir.open(tmp_path / "a", RECIPE).close()


def test_the_lock_waits_a_little_for_an_owner_that_is_leaving(tmp_path):
    child = owner(tmp_path / "a")
    multiprocessing.get_context("fork").Process(target=lambda: (time.sleep(0.5), child.kill())).start()
    RunDir.open(tmp_path / "a", RECIPE).close()
    child.join(10)
    assert child.exitcode == -signal.SIGKILL  # the owner was there, and left first


def test_a_lock_that_somebody_removes_is_taken_again_unless_another_run_was_faster(tmp_path):
    run = RunDir.open(tmp_path / "a", RECIPE)
    run.keep()
    (tmp_path / "a" / ".lock").unlink()
    run.keep()
    assert f"pid {os.getpid()} on" in (tmp_path / "a" / ".lock").read_text()
    run.keep()
    (tmp_path / "a" / ".lock").unlink()
    child = owner(tmp_path / "a")
    try:
        for _ in range(2):
            with pytest.raises(BadInput, match=f"another run is writing here .pid {child.pid} on "):
                run.keep()
    finally:
        child.kill()
        child.join(10)
    run.close()
    shutil.rmtree(tmp_path / "a")
    gone = RunDir.open(tmp_path / "a", RECIPE)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(CannotWrite):
        gone.keep()
    assert not (tmp_path / "a").exists()
    gone.close()


def test_a_lock_that_another_machine_removed_is_taken_again_and_one_with_another_number_kept(tmp_path, monkeypatch):
    lock = run_lock.Lock(tmp_path / ".lock")
    (tmp_path / ".lock").unlink()
    with monkeypatch.context() as patched:  # as NFS answers for an open file that is gone
        patched.setattr(os, "fstat", mock.Mock(side_effect=OSError(errno.ESTALE, "stale")))
        lock.keep()
    assert f"pid {os.getpid()} on" in (tmp_path / ".lock").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", mock.Mock(side_effect=OSError(errno.EIO, "no answer")))
        lock.keep()  # to be asked again
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "samestat", lambda *_: False)
        lock.keep()
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, tmp_path / ".lock"]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "BlockingIOError" in other.stderr
    lock.release()


def test_a_checkpoint_whose_file_became_a_pipe_gives_way_to_the_one_before(tmp_path):
    started(tmp_path / "a")
    (checkpoint_of,) = (tmp_path / "a" / "checkpoints").glob("step-*")
    shutil.copytree(checkpoint_of, checkpoint_of.with_name("step-00000009"))
    for name in ("state.json", checkpoint_files.CHECKSUMS):
        path = checkpoint_of.with_name("step-00000009") / name
        path.unlink()
        os.mkfifo(path)
        assert checkpoint_files.newest(checkpoint_of.parent) == checkpoint_of


def test_a_start_removes_what_a_killed_one_was_writing_and_nothing_else(tmp_path):
    started(tmp_path / "a")
    write_events(tmp_path / "a" / "tensorboard", range(1, 3), 1.0)
    torn = [".recipe.yaml.12.tmp", ".metrics.jsonl.12.tmp", "checkpoints/.latest.12.tmp", "tensorboard/.e.partial.0"]
    torn.append("checkpoints/step-00000005/.evaluated.json.12.tmp")
    foreign = [".scores.json.12.tmp", "notes.tmp"]
    before = {path for path in (tmp_path / "a").rglob("*")}
    for name in (*torn, *foreign):
        (tmp_path / "a" / name).touch()
    RunDir.open(tmp_path / "a", RECIPE).close()
    assert {path for path in (tmp_path / "a").rglob("*")} == before | {tmp_path / "a" / name for name in foreign}


def test_a_finished_run_says_so_unless_it_is_made_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "whole", lambda directory: directory)
    run = RunDir.open(tmp_path / "a", RECIPE)
    assert run.finished(10) is None
    run.finish(10, {"accuracy": 0.5}, "the table")
    assert run.finished(10)["table"] == "the table"
    assert run.finished(20) is None
    run.truncate(5)
    assert run.finished(10) is None
    run.close()


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "whole", lambda directory: directory)
    run = RunDir.open(tmp_path / "a", RECIPE)
    run.finish(10, {"accuracy": 0.5}, "the table", patience=2)
    assert run.finished(10, patience=2)["table"] == "the table"
    assert run.finished(10, patience=1) is not None
    assert run.finished(10, patience=3) is None
    assert run.finished(10, patience=0) is None  # never stop early
    run.finish(10, {"accuracy": 0.5}, "the table")  # all steps are taken: patience has no say
    assert run.finished(10, patience=3) is not None
    run.close()


@pytest.mark.parametrize("content", ["[1]", '{"total_steps": "many", "table": ""}', '{"total_steps": 10}', "{", "3"])
def test_a_finished_json_of_another_form_is_as_good_as_none(tmp_path, content):
    run = RunDir.open(tmp_path / "a", RECIPE)
    (tmp_path / "a" / "finished.json").write_text(content)
    assert run.finished(10) is None
    run.close()


def test_a_finished_run_without_its_adapter_exports_it_again_or_says_that_it_cannot(tmp_path, caplog):
    run = RunDir.open(tmp_path / "a", RECIPE)
    run.finish(10, {}, "the table")
    with pytest.raises(BadInput, match="its adapter is not whole and there is no checkpoint"):
        run.finished(10)
    run.resume_from = tmp_path / "a" / "checkpoints" / "step-00000010"
    assert run.finished(10) is None and "exported again from checkpoint step-00000010" in caplog.text
    run.close()


def test_lost_lines_of_the_curves_are_said_and_the_last_one_is_kept_for_the_table(tmp_path, caplog):
    run = RunDir.open(tmp_path / "a", RECIPE)
    run.metrics_path.write_text("".join(json.dumps({"step": s, "loss": 0.5}) + "\n" for s in (1, 2, 5, 6)))
    assert run.truncate(5) == {"step": 5, "loss": 0.5}
    assert "the lines of 2 steps are lost (3, 4)" in caplog.text
    run.close()


MOVED = "data.sources.0.dir"


@pytest.mark.parametrize(
    "now, message",
    [
        ({MOVED: "same"}, None),
        ({}, r"data\.sources\.0\.dir: old -> new"),
        ({MOVED: "other"}, "names other data than this run was trained on"),
    ],
)
def test_the_same_data_at_another_path_continues_and_other_data_at_the_same_path_does_not(tmp_path, now, message):
    def recipe(place):
        return RECIPE | {"data": {"sources": [{"dir": place}]}}

    run = saved_after_5(tmp_path / "a", recipe("old"), {rundir.IDENTITIES: {MOVED: "same"}})
    if message is None:
        opened = RunDir.open(run, recipe("new"), identities=now)
        assert opened.differing == ("data.sources.0.dir: old -> new",) and opened.resume_from.name == "step-00000005"
        opened.close()
        return
    with pytest.raises(BadInput, match=message):
        RunDir.open(run, recipe("new"), identities=now)


def saved_after_5(run: Path, recipe: dict, extra: dict) -> Path:
    """A run directory with one checkpoint."""
    RunDir.open(run, recipe).close()
    files = {"state.json": header(step=5, extra=extra), "recipe.json": recipe, "fingerprint.json": {}}
    writers = {name: lambda path, value=value: write_json(path, value) for name, value in files.items()}
    for name in ("weights.safetensors", "optimizer.safetensors"):
        writers[name] = lambda path: save_tensors(path, {"w": torch.zeros(1)})
    checkpoint_files.write(run / "checkpoints", 5, writers, 2, False)
    return run


def test_a_checkpoint_that_noted_no_data_goes_on_where_its_old_path_holds_the_same(tmp_path):
    manifest = tiny_features.write_features(tmp_path / "old", [tiny_features.sample(i) for i in range(8)])
    tiny_features.write_features(tmp_path / "other", [tiny_features.sample(i) for i in range(9)])
    shutil.copytree(tmp_path / "old", tmp_path / "new")

    def recipe(name):
        return RECIPE | {"data": {"sources": [{"dir": str(tmp_path / name), "split": "train"}]}}

    def opened(name):
        now = {MOVED: identities._of_data(Manifest.load(tmp_path / name), "train")}
        return RunDir.open(run, recipe(name), identities=now)

    assert manifest.name == "toy"
    run = saved_after_5(tmp_path / "a", recipe("old"), {})
    opened("new").close()
    with pytest.raises(BadInput, match="names other data than this run was trained on"):
        opened("other")
    (tmp_path / "old").rename(tmp_path / "away")
    with pytest.raises(BadInput, match=r"data\.sources\.0\.dir: .* What has only moved is known .*ln -s NEW OLD"):
        opened("new")
    (tmp_path / "old").symlink_to(tmp_path / "away")
    opened("new").close()


def test_a_run_from_before_an_option_with_another_value_than_its_default_says_what_changed(tmp_path):
    now = recipes.to_dict(recipes.filled(recipes.load(ROOT / "recipes" / "lora_llava15_instruct.yaml", [])))
    before = copy.deepcopy(now)
    del before["backbone"]["image_backend"]
    run = saved_after_5(tmp_path / "a", before, {})
    with contextlib.closing(RunDir.open(run, now)) as opened:
        assert opened.differing == ("backbone.image_backend: pil -> torchvision",)
    now["backbone"]["image_backend"] = "pil"
    with contextlib.closing(RunDir.open(run, now)) as opened:
        assert opened.differing == ()


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


def write_events(folder: Path, steps: range, value: float) -> None:
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("recipe", "seed: 0", 0)
        for step in steps:
            writer.add_scalar("loss", value, step)


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
