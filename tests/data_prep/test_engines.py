"""What Ray's workers can import. Ray itself is no dependency, so a stand-in starts the workers here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from data_prep.common import engines
from tests.helpers import ray_tasks

SOURCE = "import data_prep.common.engines\n\ndef double(x):\n    return 2 * x\n"


@pytest.fixture
def double(tmp_path, monkeypatch):
    """A function in a module that only the PYTHONPATH of this process leads to, as in a source of one's own."""
    (tmp_path / "own_source.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", ray_tasks.stand_in())
    import own_source

    yield own_source.double
    del sys.modules["own_source"]


def test_workers_of_ray_import_from_the_pythonpath_of_the_command_and_from_the_project(double):
    assert sorted(engines.run_jobs(double, [1, 2, 3], "ray", 0)) == [(0, 2), (1, 4), (2, 6)]


def test_the_stand_in_fails_where_the_pythonpath_of_the_command_is_gone(double, monkeypatch):
    monkeypatch.setattr(engines, "python_path", lambda: str(engines.ROOT))
    with pytest.raises(subprocess.CalledProcessError) as failed:
        list(engines.run_jobs(double, [1], "ray", 0))
    assert "No module named 'own_source'" in failed.value.stderr


def test_without_ray_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(engines.BadInput, match="pip install"):
        list(engines.run_jobs(abs, [1], "ray", 0))


def end(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_one_line_that_says_what_to_do():
    with pytest.raises(engines.BadInput, match="a worker of prepare.py was killed.*the same command continues"):
        list(engines.run_jobs(end, [1, 2, 3, 4], "local", 2))
