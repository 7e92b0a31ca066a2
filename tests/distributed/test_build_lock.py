"""The lock of a folder in which an extension is compiled: who waits for it, and for how long."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from mmpeft_ds.distributed import build_lock
from mmpeft_ds.distributed.build_lock import BuildLock, is_finished
from mmpeft_ds.owner import Owner
from tests.helpers import launch

HOLDER = """
import sys, time
from mmpeft_ds.distributed.build_lock import BuildLock
assert BuildLock(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of an extension whose library is finished."""
    folder = tmp_path / "op"
    folder.mkdir()
    (tmp_path / "a.cpp").touch()
    (folder / "build.ninja").write_text(f"build a.o: compile {tmp_path / 'a.cpp'}\nbuild op.so: link a.o\n")
    (folder / "op.so").touch()
    (folder / ".ninja_log").touch()
    return folder


def in_thread(lock: BuildLock) -> tuple[threading.Thread, list[bool]]:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(lock.try_acquire()), daemon=True)
    thread.start()
    return thread, answers


def hold(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=launch.environment())
    assert process.stdout.readline() == "held\n"
    return process


def test_a_finished_library_is_loaded_without_the_lock(folder):
    (folder / "lock").touch()
    lock = BuildLock(str(folder / "lock"))
    assert not lock.try_acquire() and (folder / "lock").exists()
    lock.wait()


def later(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_mtime_ns + 10**9,) * 2)


@pytest.mark.parametrize("change", ["newer source", "half linked", "no library", "source gone", "unknown sources"])
def test_a_library_that_is_not_finished_is_compiled(folder, change):
    assert is_finished(folder)
    source = folder.parent / "a.cpp"
    actions = {
        "newer source": lambda: later(source),
        "half linked": lambda: later(folder / "op.so"),
        "no library": (folder / "op.so").unlink,
        "source gone": source.unlink,
        "unknown sources": lambda: (folder / "build.ninja").write_text(""),
    }
    actions[change]()
    assert not is_finished(folder)
    lock = BuildLock(str(folder / "lock"))
    assert lock.try_acquire() and (folder / "lock").exists()
    lock.release()
    assert not (folder / "lock").exists()


def test_who_waits_names_the_file_and_its_owner_and_takes_it_when_that_one_dies(folder, monkeypatch):
    monkeypatch.setattr(build_lock, "SILENT", 0.2)
    (folder / "op.so").unlink()
    path = folder / "lock"
    holder = hold(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            thread, answers = in_thread(lock := BuildLock(str(path)))
            end = time.monotonic() + 60
            while "waiting" not in said.getvalue() and time.monotonic() < end:
                time.sleep(0.05)
            assert f"waiting for {path}, held by pid {holder.pid} on " in said.getvalue() and thread.is_alive()
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            thread.join(60)
        assert answers == [True] and Owner.read(path.read_text()).pid == os.getpid()
        assert f"removed {path}; pid {holder.pid}" in said.getvalue()
        lock.release()
    finally:
        holder.kill()


def test_the_others_load_what_one_has_compiled(folder):
    library = (folder / "op.so").rename(folder / "elsewhere")
    first = BuildLock(str(folder / "lock"))
    assert first.try_acquire()
    waiting = [in_thread(BuildLock(str(folder / "lock"))) for _ in range(3)]
    time.sleep(0.3)
    assert all(thread.is_alive() for thread, _ in waiting)
    library.rename(folder / "op.so")
    first.release()
    for thread, answers in waiting:
        thread.join(60)
        assert answers == [False]


@pytest.mark.parametrize("finished_meanwhile", [True, False])
def test_who_gets_the_lock_looks_again_whether_the_library_was_finished_meanwhile(
    folder, monkeypatch, finished_meanwhile
):
    """Between its look and its taking of the lock another process may have compiled, and released it."""
    looks = iter([False, finished_meanwhile])
    monkeypatch.setattr(build_lock, "is_finished", lambda of: next(looks))
    lock = BuildLock(str(folder / "lock"))
    assert lock.try_acquire() is not finished_meanwhile
    assert (folder / "lock").exists() is not finished_meanwhile and next(looks, None) is None
    if not finished_meanwhile:
        lock.release()


def test_a_lock_of_torch_is_left_to_whoever_has_it_open(folder, monkeypatch):
    """Its name is not in it; whoever compiles keeps it open."""
    monkeypatch.setattr(build_lock, "is_on_local_disk", lambda path: True)
    (folder / "op.so").unlink()
    path = folder / "lock"
    path.touch()
    with subprocess.Popen(["sleep", "600"], stdin=path.open()) as other:
        thread, answers = in_thread(BuildLock(str(path)))
        thread.join(0.5)
        assert thread.is_alive() and path.exists()
        other.kill()
    thread.join(60)
    assert answers == [True]


def test_a_lock_of_another_machine_is_left_as_long_as_that_touches_it(folder, monkeypatch):
    monkeypatch.setattr(build_lock, "LIFELESS", 0.6)
    (folder / "op.so").unlink()
    path = folder / "lock"
    path.write_text(Owner("nodeb", "another boot", 1, 1, "12:00").line())
    thread, answers = in_thread(BuildLock(str(path)))
    for _ in range(10):
        time.sleep(0.1)
        later(path)
    assert thread.is_alive()
    thread.join(60)
    assert answers == [True]


def test_torch_takes_these_locks(monkeypatch):
    monkeypatch.setattr(cpp_extension, "FileBaton", None)
    build_lock.install()
    assert cpp_extension.FileBaton is BuildLock
