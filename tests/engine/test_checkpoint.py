"""Checkpoint files: complete or absent, damage is found and named, the newest whole one is taken."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmpeft_ds.engine import checkpoint, checkpoint_files
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs.finished import find_checkpoint
from tests.helpers.runs.checkpoint_header import header


def files(value: float = 1.0) -> dict:
    """Writers of small but real files."""
    return {
        "weights.safetensors": lambda p: save_file({"w": torch.full((3,), value)}, p),
        "optimizer.safetensors": lambda p: save_file({"w.exp_avg": torch.full((3,), value)}, p),
        "state.json": lambda p: p.write_text(json.dumps(header())),
    }


def write(folder: Path, step: int, keep: int = 9, best: bool = False) -> Path:
    return checkpoint_files.write(folder / "checkpoints", step, files(step), keep, best)


def names(folder: Path) -> list[str]:
    return [p.name for p in checkpoint_files.listing(folder / "checkpoints")]


def pointer(folder: Path, name: str = "latest") -> str:
    return (folder / "checkpoints" / name).read_text().strip()


def test_a_whole_checkpoint_has_no_damage_and_is_the_newest(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    assert checkpoint_files.damage(path) is None
    assert checkpoint.newest_valid(tmp_path) == path
    assert pointer(tmp_path) == "step-00000010"


def test_no_checkpoints_are_no_error(tmp_path):
    assert checkpoint.newest_valid(tmp_path) is None


def test_a_damaged_or_missing_best_is_told_and_left_out(tmp_path, caplog):
    path = write(tmp_path, 5, best=True)
    write(tmp_path, 10)
    assert checkpoint.best_valid(tmp_path) == path
    (path / "weights.safetensors").write_bytes(b"cut")
    assert checkpoint.best_valid(tmp_path) is None
    assert "best checkpoint is damaged: weights.safetensors" in caplog.text
    (tmp_path / "checkpoints" / "best").unlink()
    assert checkpoint.best_valid(tmp_path) is None


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_falls_back_and_names_the_file(tmp_path, caplog, file):
    before = write(tmp_path, 5)
    path = write(tmp_path, 10) / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest_valid(tmp_path) == before
    assert "step-00000010" in caplog.text and file in caplog.text and "step-00000005" in caplog.text


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda p: (p / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda p: (p / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda p: (p / "checksums.json").write_text("{"), "checksums.json cannot be read"),
        (lambda p: (p / "checksums.json").write_text("{}"), "checksums.json is empty"),
        (lambda p: (p / "state.json").write_text(""), "state.json has sha256"),
    ],
)
def test_every_kind_of_damage_is_told(tmp_path, break_it, told):
    path = write(tmp_path, 5)
    break_it(path)
    assert told in checkpoint_files.damage(path)


@pytest.mark.parametrize("same_time", [False, True])
def test_files_that_were_found_whole_are_read_again_where_they_have_changed_since(tmp_path, same_time, monkeypatch):
    file = write(tmp_path, 5) / "weights.safetensors"
    assert checkpoint.newest_valid(tmp_path) == file.parent
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "damage", lambda path: "read again")
        assert checkpoint_files.damage_since(file.parent) is None
    was = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    if same_time:
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert "weights.safetensors has" in checkpoint_files.damage_since(file.parent)
    data[-1] ^= 1
    file.write_bytes(data)
    assert checkpoint_files.damage_since(file.parent) is None


def test_all_damaged_is_refused_and_not_started_over(tmp_path):
    for step in (5, 10):
        (write(tmp_path, step) / "state.json").unlink()
    with pytest.raises(BadInput, match="step-00000010.*step-00000005.*--fresh"):
        checkpoint.newest_valid(tmp_path)


def test_the_last_n_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step, keep=2, best=step == 2)
    assert names(tmp_path) == ["step-00000005", "step-00000004", "step-00000002"]
    assert pointer(tmp_path, "best") == "step-00000002"
    write(tmp_path, 6, keep=2, best=True)
    assert names(tmp_path) == ["step-00000006", "step-00000005"]


def test_a_step_saved_again_does_not_touch_the_first_before_it_is_whole(tmp_path):
    write(tmp_path, 5, keep=1)
    again = write(tmp_path, 5, keep=1, best=True)
    assert again.name == "step-00000005.1" == pointer(tmp_path) == pointer(tmp_path, "best")
    assert names(tmp_path) == ["step-00000005.1"]


def test_a_pointer_moved_back_by_hand_is_followed(tmp_path):
    first = write(tmp_path, 5)
    write(tmp_path, 10)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000005\n")
    assert checkpoint.newest_valid(tmp_path) == first


def test_a_newest_checkpoint_that_somebody_removed_is_named_and_a_run_without_any_does_not_begin_anew(
    tmp_path, caplog
):
    first, second = write(tmp_path, 5), write(tmp_path, 10)
    shutil.rmtree(second)
    assert checkpoint.newest_valid(tmp_path) == first
    (line,) = caplog.messages
    assert line == "checkpoint 'step-00000010', which `latest` names, is missing; continuing from step-00000005"
    shutil.rmtree(first)
    with pytest.raises(BadInput, match="no checkpoint is whole .checkpoint 'step-00000010', which `latest` names"):
        checkpoint.newest_valid(tmp_path)


def test_an_evaluation_is_added_to_the_checkpoint_that_was_saved_before_it(tmp_path):
    first, second = write(tmp_path, 5, best=True), write(tmp_path, 10, keep=1)
    state = TrainState(step=10, best=0.5, best_step=10, extra={"evaluated_at": 10})
    checkpoint.record_evaluation(second, state, keep_last=1, best=True)
    assert checkpoint.best_valid(tmp_path) == second and checkpoint_files.damage(second) is None
    assert TrainState(**checkpoint_files.evaluated(second, 10)) == state
    assert not first.exists()  # it was kept for being the best


def test_an_evaluation_is_made_again_where_any_byte_of_its_file_has_changed(tmp_path, caplog):
    path = write(tmp_path, 10)
    assert checkpoint_files.evaluated(path, 10) is None and not caplog.messages
    state = TrainState(step=10, best=0.5, best_step=10, extra={"evaluated_at": 10, "nan": float("nan")})
    checkpoint.record_evaluation(path, state, keep_last=1, best=True)
    file = path / "evaluated.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = checkpoint_files.evaluated(path, 10)
        # White space and such become other white space, or digits that mean the same: nothing else may pass.
        assert found is None or json.dumps(found) == json.dumps(vars(state)), whole[at - 9 : at + 9]
        file.write_bytes(whole[:at])
        assert checkpoint_files.evaluated(path, 10) is None or at == len(whole) - 1  # less the last end of a line
    assert "evaluated.json is damaged; the evaluation is made again" in caplog.text
    file.write_text(json.dumps(vars(state)))  # as older versions wrote it
    assert checkpoint_files.evaluated(path, 10)["best"] == 0.5 and checkpoint_files.evaluated(path, 11) is None


def test_no_checkpoint_is_the_best_before_an_evaluation(tmp_path):
    path = write(tmp_path, 5)
    assert not (tmp_path / "checkpoints" / "best").exists() and find_checkpoint(tmp_path, "best") == path
    checkpoint.record_evaluation(path, TrainState(step=5), keep_last=1, best=False)
    assert not (tmp_path / "checkpoints" / "best").exists()


@pytest.mark.parametrize("best_of", ["an evaluation", "a new checkpoint"])
def test_a_kill_between_its_state_and_its_pointer_does_not_lose_the_best(tmp_path, monkeypatch, best_of):
    """Else the run would go on from a state that knows of a best checkpoint which nothing points to."""
    path, plain = write(tmp_path, 5), checkpoint_files.write_atomic

    def killed(target, text):
        if target.name == "best":
            raise KeyboardInterrupt
        plain(target, text)

    monkeypatch.setattr(checkpoint_files, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        if best_of == "an evaluation":
            checkpoint.record_evaluation(path, TrainState(step=5, best=0.5, best_step=5), keep_last=1, best=True)
        else:
            write(tmp_path, 10, best=True)
    assert not (path / "evaluated.json").exists() and checkpoint.newest_valid(tmp_path) == path


@pytest.mark.parametrize("victim", ["weights.safetensors", "state.json", "checksums.json"])
def test_kill_9_while_saving_leaves_the_previous_one(tmp_path, victim):
    """A child writes step 10 and is killed while the file `victim` is on its way."""
    before = write(tmp_path, 5)

    def hang(path: Path) -> None:
        path.write_bytes(b"half")
        (tmp_path / "reached").touch()
        time.sleep(60)

    def save() -> None:
        if victim == "checksums.json":
            checkpoint_files.write_json = lambda path, value, **options: hang(path)
        checkpoint_files.write(
            tmp_path / "checkpoints", 10, {**files(), victim: hang} if victim in files() else files(), 9, False
        )

    child = multiprocessing.get_context("fork").Process(target=save)
    child.start()
    end = time.monotonic() + 30
    while not (tmp_path / "reached").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join(10)
    assert (tmp_path / "reached").exists()
    assert checkpoint.newest_valid(tmp_path) == before and pointer(tmp_path) == "step-00000005"
    write(tmp_path, 10)
    assert not list((tmp_path / "checkpoints").glob(".*"))


STATE = header()["state"]
LACKING = {key: {k: v for k, v in header().items() if k != key} for key in ("format", "optimizer_step", "state")}


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ([], "state.json holds values of another type"),
        (header() | {"state": []}, "state.json holds values of another type (state)"),
        (header() | {"state": STATE | {"extra": 1}}, "state.json holds values of another type (extra)"),
        (header() | {"state": STATE | {"step": "3"}}, "state.json holds values of another type (step)"),
        *((without, f"state.json lacks {key}") for key, without in LACKING.items()),
        (header() | {"state": {"epoch": 0, "step": 1}}, "lacks step_in_epoch, global_batch of its state"),
    ],
)
def test_a_state_of_another_form_is_passed_over_though_the_checksums_are_right(tmp_path, caplog, written, line):
    good = write(tmp_path, 5)
    other = files() | {"state.json": lambda p: p.write_text(json.dumps(written))}
    checkpoint_files.write(tmp_path / "checkpoints", 10, other, 9, False)
    assert checkpoint.newest_valid(tmp_path) == good
    (said,) = caplog.messages
    assert line in said and said.endswith("; continuing from step-00000005")
