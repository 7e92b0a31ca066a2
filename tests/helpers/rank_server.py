"""Ranks forked from a process that has imported torch, deepspeed and this package already.

A launch costs about 25 seconds of CPU before the first step, nearly all of it imports in two launchers and two ranks.
`launch.run_forked` has the same ranks run the same script without them; `launch.run` is for tests of what a launcher
does.

    python -m tests.helpers.rank_server      one job per line of JSON on stdin, exit codes of its ranks on stdout
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

from mmpeft_ds import console
from tests.helpers import ROOT, namespaces

# Everything that takes long to import, and nothing that starts a thread or joins a process group.
IMPORTS = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "mmpeft_ds.engine.trainer",
    "mmpeft_ds.runs.evaluate",
    "tests.helpers.runs.tiny_pairs",
)

_server: subprocess.Popen | None = None


def ask(job: dict[str, Any]) -> list[int | None]:
    """Have the server of this process run a job: {script, args, environments, hosts, log, timeout}.

    Returns:
        exit codes of the processes, one for each of `environments`; None where one was killed when the time was up.
    """
    global _server
    if _server is None:
        command = [sys.executable, "-m", "tests.helpers.rank_server"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _server = subprocess.Popen(command, **pipes, env=job["environments"][0], cwd=ROOT, start_new_session=True)
        atexit.register(_server.kill)
    process = _server
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, f"the server of ranks has ended with code {process.wait()}"
    return json.loads(answer)


def ranks() -> list[psutil.Process]:
    """Processes of the job that runs now, in the order of its ranks."""
    children = psutil.Process(_server.pid).children() if _server else []
    return sorted((c for c in children if os.getsid(c.pid) == c.pid), key=lambda process: process.pid)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    with console.quick_imports():  # as launchers do: without torch's compiler, which few runs use
        for module in IMPORTS:
            importlib.import_module(module)
    # DeepSpeed collects garbage for every engine: it need not look at what was imported.
    gc.collect()
    gc.freeze()
    asker = os.getppid()
    while line := sys.stdin.readline():
        job = json.loads(line)
        pids = []
        for environment, host in zip(job["environments"], job["hosts"], strict=True):
            pid = os.fork()
            if pid == 0:
                answers.close()
                if host is not None:
                    namespaces.enter(host)
                sys.exit(_run(job, environment))
            pids.append(pid)
        codes = _wait(pids, job["timeout"], asker)
        if os.getppid() != asker:
            return
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


def _run(job: dict[str, Any], environment: dict[str, str]) -> int | str | None:
    """Run a job's script in this process as `python script` or `python -m module` would, and return its exit code."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    log, nothing = os.open(job["log"], os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for given, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(given, standard)
    script = job["script"]
    sys.argv = [script, *job["args"]]
    try:
        if script.endswith(".py"):
            sys.path[0] = str(Path(script).resolve().parent)  # under test: a launcher replaces it
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        return left.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wait(pids: list[int], timeout: float, asker: int) -> list[int | None]:
    """Wait for ranks and kill what outlives them, which are processes that a rank has started.

    The time is up as well when the process that asked has ended: a test run that is killed leaves no ranks.
    """
    codes: dict[int, int | None] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end or os.getppid() != asker:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = None
        time.sleep(0.01)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve()
