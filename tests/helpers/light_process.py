"""Commands run in forks of a process that has imported what all of them need and nothing heavy: seconds for dozens."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import ROOT

HEAVY = ("torch", "transformers", "peft", "deepspeed", "torch_geometric", "webdataset")
# What nearly every command imports. A heavy module that one of these asks for counts for every command.
SHARED = ("argparse", "numpy", "rich.console", "yaml", "mmpeft_ds.console", "mmpeft_ds.recipe")
LIMIT = 60  # seconds a command may take
# Python runs a module of this name in every process that it starts, workers included.
SITECUSTOMIZE = f"""
import os, sys

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            with open(os.environ["HEAVY_IMPORTS"], "a") as log:
                log.write(name + "\\n")

sys.meta_path.insert(0, Recorder())
"""


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: exit code.
        out, err: what it printed.
        heavy: heavy modules that it or its children looked for.
        started: whether it started another process by `subprocess`.
        left: names of the files in its working directory, which was empty before.
    """

    code: int
    out: str
    err: str
    heavy: frozenset[str]
    started: bool
    left: tuple[str, ...]


def recording(folder: Path) -> tuple[dict[str, str], Path]:
    """Environment in which heavy imports of all Python processes are written down, and the file that they stand in."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    log = folder / "imports"
    log.touch()
    return {**os.environ, "PYTHONPATH": f"{folder / 'site'}:{ROOT}", "HEAVY_IMPORTS": str(log)}, log


def run(jobs: Sequence[Sequence[str]], folder: Path) -> list[Done]:
    """Run command lines, each a script below the repository and its arguments, one after the other.

    Args:
        jobs: command lines.
        folder: an empty one for what they print.
    """
    environment, log = recording(folder)
    work = [{"args": [str(a) for a in job], "folder": str(folder / str(i))} for i, job in enumerate(jobs)]
    answered = subprocess.run(
        [sys.executable, "-m", "tests.helpers.light_process", str(log)],
        input=json.dumps(work),
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=30 + LIMIT * len(jobs),
        check=True,
    )
    return [_read(job["folder"], answer) for job, answer in zip(work, json.loads(answered.stdout), strict=True)]


def _read(folder: str, answer: dict[str, Any]) -> Done:
    out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    left = tuple(sorted(path.name for path in (Path(folder) / "cwd").iterdir()))
    return Done(answer["code"], out, err, frozenset(answer["heavy"]), (Path(folder) / "started").exists(), left)


def _serve(log: Path) -> None:
    for module in SHARED:
        importlib.import_module(module)
    shared, answers = log.read_text().split(), []
    gc.freeze()  # else each child looks at all of these objects when it ends, and so copies their memory
    for job in json.load(sys.stdin):
        log.write_text("")
        (Path(job["folder"]) / "cwd").mkdir(parents=True)
        if (pid := os.fork()) == 0:
            sys.exit(_run(job))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answers.append({"code": code, "heavy": [*shared, *log.read_text().split()]})
    print(json.dumps(answers))


def _run(job: dict[str, Any]) -> int | str | None:
    """Run a script in this process as `python script` would, and return its exit code."""
    signal.alarm(LIMIT)
    folder, (script, *args) = Path(job["folder"]), job["args"]
    for name, standard in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), standard)
    os.chdir(folder / "cwd")
    path = ROOT / script
    sys.argv = [str(path), *args]
    sys.path[0] = str(path.parent)  # under test: a script replaces it
    popen = subprocess.Popen.__init__

    def noted(*given: Any, **named: Any) -> None:
        (folder / "started").touch()
        popen(*given, **named)

    subprocess.Popen.__init__ = noted
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as left:
        return left.code
    return 0


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
