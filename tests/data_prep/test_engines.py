"""What Ray's workers can import. Ray itself is no dependency, so a stand-in starts the workers here."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

from data_prep import engines

WORK = (
    "import base64, pickle; work, job = pickle.loads(base64.b64decode(input()));"
    "print(base64.b64encode(pickle.dumps(work(job))).decode())"
)
SOURCE = "import data_prep.engines\n\ndef double(x):\n    return 2 * x\n"


def stand_in() -> SimpleNamespace:
    """As much of Ray as `run_jobs` uses. A task is a new process, with the variables of `runtime_env` in the place of
    the driver's, as Ray 2.60 does it (findings/ray_runtime_env_pythonpath.sh)."""
    ray = SimpleNamespace(is_initialized=lambda: False, shutdown=lambda: None)
    ray.exceptions = SimpleNamespace(RayTaskError=ZeroDivisionError)

    def init(runtime_env, **options):
        ray.variables = runtime_env["env_vars"]

    def get(task):
        command = [sys.executable, "-c", WORK]
        given = base64.b64encode(pickle.dumps(task())).decode()
        environment = os.environ | ray.variables
        done = subprocess.run(
            command, input=given, env=environment, cwd="/", check=True, text=True, capture_output=True
        )
        return pickle.loads(base64.b64decode(done.stdout.splitlines()[-1]))

    ray.init, ray.get = init, get
    ray.remote = lambda work: SimpleNamespace(remote=lambda job: lambda: (work, job))
    ray.wait = lambda tasks, num_returns: (tasks[:num_returns], tasks[num_returns:])
    return ray


@pytest.fixture
def double(tmp_path, monkeypatch):
    """A function in a module that only the PYTHONPATH of this process leads to, as in a source of one's own."""
    (tmp_path / "own_source.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", stand_in())
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
