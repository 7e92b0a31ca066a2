"""As much of Ray as the preparation of data uses, in place of the package."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

WORK = (
    "import base64, pickle; work, job = pickle.loads(base64.b64decode(input()));"
    "print(base64.b64encode(pickle.dumps(work(job))).decode())"
)


def stand_in() -> SimpleNamespace:
    """As much of Ray as `run_jobs` uses. A task is a new process, with the variables of `runtime_env` in place of
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
