"""Checkpoints written in the background: the same bytes, in order, and whole or absent at every moment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import time
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.engine import checkpoint, checkpoint_files, saving
from mmpeft_ds.engine.background import Background
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import snapshot
from mmpeft_ds.errors import AgreedBadInput, BadInput


def engine():
    """What a save asks of an engine at stage 0, after two steps of AdamW on one parameter."""
    module = torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.constant_(module.weight, 0.5)
    optimizer = torch.optim.AdamW(module.parameters())
    made = SimpleNamespace(
        module=module,
        optimizer=optimizer,
        device=torch.device("cpu"),
        zero_optimization_stage=lambda: 0,
    )
    step(made, 2)
    return made


def step(made, times=1):
    for _ in range(times):
        made.module.weight.grad = torch.full_like(made.module.weight, 0.25)
        made.optimizer.step()


def save(folder, made, at, background=None, **options):
    trainables = dict(made.module.named_parameters())
    facts = {"recipe": {"a": 1}, "fingerprint": {}, "keep_last": 9} | options
    state = at if isinstance(at, TrainState) else TrainState(step=at)
    return checkpoint.save(folder, made, trainables, state, background=background, **facts)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


class Held:
    """The writing of checkpoints, which stands still at its first file until it is let go."""

    def __init__(self, monkeypatch):
        self.reached, self.go, self.write = threading.Event(), threading.Event(), checkpoint.write_json
        monkeypatch.setattr(checkpoint, "write_json", self)

    def __call__(self, path, *args, **kwargs):
        self.reached.set()
        assert self.go.wait(30)
        return self.write(path, *args, **kwargs)


def test_the_files_are_those_of_a_save_in_the_foreground_whatever_is_trained_meanwhile(tmp_path, monkeypatch):
    expected, made, background = engine(), engine(), Background()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = contents(save(tmp_path / "a", expected, 2))
    held = Held(monkeypatch)
    path = save(tmp_path / "b", made, 2, background)
    assert held.reached.wait(30) and not path.exists()
    step(made)
    held.go.set()
    background.wait()
    assert contents(path) == plain
    assert (tmp_path / "b" / "checkpoints" / "latest").read_text() == f"{path.name}\n"


def test_a_checkpoint_has_the_name_and_the_state_of_its_step_where_the_training_has_gone_on(tmp_path, monkeypatch):
    made, background, state = engine(), Background(), TrainState(step=2, extra={"samples": 8})
    compared, check = threading.Event(), checkpoint.Held.check
    monkeypatch.setattr(checkpoint.Held, "check", lambda *args: compared.wait(30) and check(*args))
    path = save(tmp_path, made, state, background)
    state.step, state.extra["samples"] = 3, 12
    compared.set()
    background.wait()
    assert checkpoint_files.listing(tmp_path / "checkpoints") == [path] and path.name == "step-00000002"
    written = json.loads((path / "state.json").read_text())["state"]
    assert (written["step"], written["extra"]) == (2, {"samples": 8})


def test_a_save_waits_for_the_one_before_and_both_are_there(tmp_path, monkeypatch):
    made, background, held = engine(), Background(), Held(monkeypatch)
    paths = [save(tmp_path, made, 2, background)]
    threading.Timer(0.2, held.go.set).start()
    paths.append(save(tmp_path, made, 4, background, best=True))
    assert paths[0].exists()
    background.wait()
    assert [checkpoint_files.damage(path) for path in paths] == [None, None]
    folder = tmp_path / "checkpoints"
    assert {(folder / name).read_text().strip() for name in ("latest", "best")} == {paths[1].name}


def test_there_is_one_copy_at_a_time(tmp_path, monkeypatch):
    made, background, held, copies = engine(), Background(), Held(monkeypatch), []
    take = snapshot.HostCopies.take

    def watched(*args):
        copies.append([path.name for path in checkpoint_files.listing(tmp_path / "checkpoints")])
        return take(*args)

    monkeypatch.setattr(snapshot.HostCopies, "take", watched)
    save(tmp_path, made, 2, background)
    threading.Timer(0.2, held.go.set).start()
    save(tmp_path, made, 4, background)
    background.wait()
    assert copies == [[], ["step-00000002"]]


def test_a_step_saved_again_takes_another_name(tmp_path):
    made, background = engine(), Background()
    first, again = save(tmp_path, made, 2, background), save(tmp_path, made, 2, background)
    background.wait()
    assert first != again and checkpoint_files.listing(tmp_path / "checkpoints") == [again]


def test_a_directory_that_cannot_be_written_is_told_in_a_line_and_the_next_save_may_succeed(tmp_path):
    made, background, run = engine(), Background(), tmp_path / "run"
    run.mkdir()
    first = save(run, made, 2, background)
    background.wait()
    shutil.rmtree(run)
    save(run, made, 4, background)
    with pytest.raises(AgreedBadInput, match="checkpoints: cannot be written, since its directory is gone"):
        background.wait()
    assert background.failed
    run.mkdir()
    again = save(run, made, 4, background)
    background.wait()
    assert not background.failed and first != again and checkpoint_files.damage(again) is None


def test_checkpoints_that_may_not_be_looked_at_are_told_by_the_thread_to_all_ranks(tmp_path, monkeypatch):
    made, background = engine(), Background()

    def denied(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(checkpoint_files, "place", denied)
    save(tmp_path, made, 2, background)
    with pytest.raises(AgreedBadInput, match="Permission denied"):
        background.wait()


def test_the_training_learns_of_a_failure_before_the_next_save(tmp_path):
    made, background = engine(), Background()
    save(tmp_path / "nowhere", made, 2, background)
    problem = met_by(background)
    assert isinstance(problem, AgreedBadInput) and "its directory is gone" in str(problem) and background.failed
    assert background.problem() is None  # once


def met_by(background: Background) -> Exception | None:
    """What a step would meet, once the save has ended."""
    end = time.monotonic() + 30
    while (problem := background.problem()) is None and time.monotonic() < end:
        time.sleep(0.01)
    return problem


def test_a_fault_of_ours_is_met_before_the_next_save_too_and_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    made, background = engine(), Background()
    monkeypatch.setattr(checkpoint_files, "write", lambda *a: 1 / 0)
    save(tmp_path, made, 2, background)
    problem = met_by(background)
    assert type(problem) is RuntimeError and isinstance(problem.__cause__, ZeroDivisionError)
    assert str(problem) == "no checkpoint in the background: ZeroDivisionError: division by zero"
    save(tmp_path, made, 4, background)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, made, 6, background)


def test_kill_9_while_it_is_written_leaves_the_previous_one(tmp_path, monkeypatch):
    made, background = engine(), Background()
    before = save(tmp_path, made, 2, background)
    background.wait()

    def child():
        def hang(path, *args, **kwargs):
            path.write_bytes(b"half")
            (tmp_path / "reached").touch()
            time.sleep(60)

        monkeypatch.setattr(checkpoint, "write_json", hang)
        save(tmp_path, made, 4, Background())
        (tmp_path / "training").touch()
        time.sleep(60)

    process = get_context("fork").Process(target=child)
    process.start()
    end = time.monotonic() + 30
    while not ((tmp_path / "reached").exists() and (tmp_path / "training").exists()) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert (tmp_path / "reached").exists() and (tmp_path / "training").exists()
    assert checkpoint.newest_valid(tmp_path) == before
    after = save(tmp_path, made, 4, background)
    background.wait()
    assert checkpoint.newest_valid(tmp_path) == after and not list((tmp_path / "checkpoints").glob(".*"))


def test_counts_of_all_ranks_and_the_curves_come_before_the_files_and_the_training_counts_on(tmp_path):
    made, background, order = engine(), Background(), []
    budget, observer = BadBudget(0.5, 9), SimpleNamespace(flush=lambda: lambda: order.append("curves"))
    budget.counts, budget.seen = {"image": 2}, 5
    left = saving.late(budget, SimpleNamespace(keep=lambda: order.append("directory")), observer)
    budget.counts["image"], budget.seen = 3, 6
    assert order == ["directory"]
    path = save(tmp_path, made, TrainState(step=2, extra={"bad_budget": {}}), background, late=left)
    background.wait()
    written = json.loads((path / "state.json").read_text())["state"]["extra"]["bad_budget"]
    assert (written["counts"], written["seen"], order) == ({"image": 2}, 5, ["directory", "curves"])


@pytest.mark.parametrize("where", ["directory", "curves"])
def test_a_run_whose_directory_or_curves_are_taken_away_writes_no_checkpoint(tmp_path, where):
    def refuse():
        raise BadInput("another run has taken it")

    made, background = engine(), Background()
    run_dir = SimpleNamespace(keep=refuse if where == "directory" else lambda: None)
    left = saving.late(BadBudget(0.5, 9), run_dir, SimpleNamespace(flush=lambda: refuse))
    save(tmp_path, made, TrainState(step=2, extra={}), background, late=left)
    with pytest.raises(AgreedBadInput, match="another run has taken it"):
        background.wait()
    assert not (tmp_path / "checkpoints").exists()
