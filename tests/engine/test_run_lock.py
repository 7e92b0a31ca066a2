"""The lock of a run directory: one live owner, taken again where somebody has removed it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from mmpeft_ds.engine import run_lock, rundir
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import CannotWrite
from tests.helpers.runs.run_directories import RECIPE


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077], ids=oct)
def test_a_colleague_may_take_the_lock_where_the_umask_lets_them_write(tmp_path, umask):
    before = os.umask(umask)
    try:
        RunDir.open(tmp_path / "a", RECIPE).close()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "a").iterdir() if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask} and tmp_path / "a" / ".lock" in files


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
