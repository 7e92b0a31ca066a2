"""What killed processes leave in the temporary folder and in shared memory goes with the next start, nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mmpeft_ds import leftovers
from mmpeft_ds.owner import Owner, started
from tests.helpers import launch

LOADER = """
import os, time
from mmpeft_ds import leftovers
from mmpeft_ds.data.workers import WorkerPool
if __name__ == "__main__":
    pool = WorkerPool(abs, 2, 2)
    pool.wait()
    print(leftovers.own_name(), flush=True)
    time.sleep(600)
"""


def made_by(name: str) -> list[Path]:
    return [path for path in leftovers._all() if name in path.name]


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """A process with loader workers, as a rank has them, in a session of its own; and what its files are called."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "loader.py").write_text(LOADER)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "loader.py")],
        stdout=subprocess.PIPE,
        text=True,
        env=launch.environment(TMPDIR=str(tmp_path)),
        start_new_session=True,
    )
    yield process, process.stdout.readline().strip()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_next_start_removes_what_a_killed_run_has_left(loader):
    process, name = loader
    assert any(path.is_dir() for path in made_by(name)) and any(path.name.startswith("sem.") for path in made_by(name))
    before = made_by(name)
    assert not set(leftovers.remove_of_the_dead()) & set(before) and made_by(name) == before, "it lives"
    os.killpg(process.pid, signal.SIGKILL)  # all at once: nobody is left to clean up
    process.wait()
    assert made_by(name), "control"
    leftovers.remove_of_the_dead()
    assert made_by(name) == []


def test_names_of_other_containers_and_boots_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = f"{leftovers.PREFIX}-{leftovers._here()}-4000000-1"
    for name in (gone, f"{leftovers.PREFIX}-00000000-4000000-1", leftovers.own_name(), "pymp-x"):
        (tmp_path / name).mkdir()
    assert leftovers.remove_of_the_dead() == [tmp_path / gone]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_process_that_took_the_number_of_a_dead_one_is_another():
    me = Owner.me()
    assert me.ended() is False and Owner.read(me.line()) == me
    assert Owner(me.host, me.space, me.pid, me.started - 1).ended() is True
    assert Owner("other", "another boot", me.pid, me.started).ended() is None
    assert Owner.read("") is None and Owner.read("[]") is None and Owner.read('{"pid": 1}') is None
    child = subprocess.Popen(["true"])
    while started(child.pid) is not None:  # a zombie until it is waited for
        pass
    child.wait()
