"""launchers/supervise.py restarts a run after faults until it is finished, and ends where a restart cannot help."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.helpers import ROOT, hosts, launch
from tests.helpers.runs import endless

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
SUPERVISE = str(ROOT / "launchers" / "supervise.py")
STEPS, LIMIT = 60, 300.0
FAULT = """
from mmpeft_ds.registration import when_imported
def patch():
    from mmpeft_ds.engine.step import Stepper
    train_step = Stepper.train_step
    def fail(self, step, waited):
        if self.state.step == 7:
            raise ZeroDivisionError(f"object at {id(self)}")
        return train_step(self, step, waited)
    Stepper.train_step = fail
when_imported("mmpeft_ds.engine.step", patch)
"""


class Supervised:
    """A supervisor and its ranks, which torch starts in sessions of their own; leaves no process behind."""

    def __init__(self, recipe: Path, *options: str, start: Callable = subprocess.Popen, env: dict | None = None):
        self.recipe, self.log = recipe, recipe.with_name(f"log-{time.monotonic_ns()}")
        words = [sys.executable, SUPERVISE, "--recipe", str(recipe), *options]
        with self.log.open("wb") as log:
            self.process = start(
                words, cwd=ROOT, env=launch.environment(**(env or {})), stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for rank in self.ranks():
            with contextlib.suppress(psutil.Error):
                rank.kill()

    def ranks(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[1:4] == [str(ROOT / "launchers" / "train.py"), "--recipe", str(self.recipe)]:
                    found.append(process)
        return found

    def lines(self) -> list[str]:
        """What the supervisor has said."""
        said = self.log.read_text(errors="replace").splitlines()
        return [line.partition(": ")[2] for line in said if line.startswith("supervise on ")]

    def reach(self, step: int) -> None:
        endless.reach(self.recipe.parent / "run", step, lambda: self.process.poll() is None, LIMIT)

    def wait(self) -> int:
        return self.process.wait(LIMIT)


def recipe_of(folder: Path, steps: int = STEPS) -> Path:
    folder.mkdir(exist_ok=True)
    path = endless.prepare(folder)
    content = yaml.safe_load(path.read_text())
    content["optim"]["max_steps"] = content["engine"]["eval_every"] = steps
    path.write_text(yaml.safe_dump(content))
    return path


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows]


def test_killed_ranks_are_started_again_and_the_curve_and_adapter_are_those_of_a_quiet_run(tmp_path):
    quiet, disturbed = recipe_of(tmp_path / "quiet"), recipe_of(tmp_path / "disturbed")
    result = launch.run_forked(str(ROOT / "launchers" / "train.py"), "--recipe", str(quiet), timeout=LIMIT)
    assert result.code == 0, result.tail()
    with Supervised(disturbed, "--nproc-per-node", "2") as supervised:
        supervised.reach(7)
        supervised.ranks()[1].kill()
        assert supervised.wait() == 0, supervised.log.read_text()
        assert not supervised.ranks()
    (line,) = supervised.lines()
    assert "was ended by SIGKILL" in line and "restart 1 of 20 now" in line
    assert curve(disturbed.parent / "run") == curve(quiet.parent / "run")
    weights = [p.parent / "run" / "adapter" / "adapter_model.safetensors" for p in (quiet, disturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_bad_input_ends_it_at_once(tmp_path):
    recipe = recipe_of(tmp_path)
    with Supervised(recipe, "--nproc-per-node", "2", "--set", f"data.sources.0.dir={tmp_path / 'none'}") as supervised:
        assert supervised.wait() == 2
    (line,) = supervised.lines()
    assert line.startswith("ended: local rank") and "exited with 2: bad input" in line
    assert supervised.log.read_text().count("error: ") == 1


@pytest.mark.slow
def test_the_same_traceback_at_the_same_step_ends_it_after_one_restart(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULT)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    with Supervised(recipe_of(tmp_path), "--nproc-per-node", "2", env={"PYTHONPATH": path}) as supervised:
        assert supervised.wait() == 1
    first, second = supervised.lines()
    assert "restart 1 of 20" in first
    assert second.startswith("ended: the same traceback twice after step 7") and "ZeroDivisionError" in second


@pytest.mark.slow
def test_the_budget_ends_it_and_pauses_grow_without_progress(tmp_path):
    recipe = recipe_of(tmp_path, endless.STEPS)
    with Supervised(recipe, "--nproc-per-node", "2", "--max-restarts", "3", "--pause", "0.5") as supervised:
        known: set[int] = set()
        for _ in range(4):
            while not (new := [rank for rank in supervised.ranks() if rank.pid not in known]):
                assert supervised.process.poll() is None
                time.sleep(0.05)
            known |= {rank.pid for rank in supervised.ranks()}
            new[0].kill()
        assert supervised.wait() == 1
        assert not supervised.ranks()
    *restarts, last = supervised.lines()
    assert [line.rpartition("; ")[2] for line in restarts] == [
        f"restart {n} of 3 in {pause} s" for n, pause in ((1, "0.5"), (2, "1"), (3, "2"))
    ]
    assert last.startswith("ended: local rank") and "budget of 3 restarts is spent" in last


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, shown, again",
    [
        (signal.SIGUSR1, "RUNNING None", True),
        (signal.SIGTERM, "RUNNING None", True),
        (signal.SIGTERM, "COMPLETING TimeLimit", True),
        (signal.SIGTERM, "COMPLETING None", False),  # scancel
        (signal.SIGINT, "RUNNING None", False),
    ],
)
def test_a_signal_lets_the_ranks_save_and_slurm_queues_the_job_again(tmp_path, number, shown, again):
    recipe = recipe_of(tmp_path, endless.STEPS)
    (tmp_path / "bin").mkdir()
    for name, line in {"scontrol": f"echo $@ >> {tmp_path}/asked", "squeue": f"echo {shown}"}.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    slurm = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4242", "SLURM_NODEID": "0"}
    with Supervised(recipe, "--nproc-per-node", "2", "--requeue", env=slurm) as supervised:
        supervised.reach(7)
        supervised.process.send_signal(number)
        assert supervised.wait() == 128 + number
        assert not supervised.ranks()
    lines = supervised.lines()
    assert lines[0] == f"stopped by {number.name}; the same command continues the run"
    assert len(lines) == 1 + (number == signal.SIGTERM and not again)
    step = endless.steps_of(tmp_path / "run")[-1]
    assert f"stopped after step {step} of" in supervised.log.read_text()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"
    asked = tmp_path / "asked"
    assert asked.read_text() == "requeue 4242\n" if again else not asked.exists()


@pytest.mark.slow
def test_under_nohup_it_goes_on_when_the_terminal_closes(tmp_path):
    recipe = recipe_of(tmp_path)

    def start(words: list[str], **options: Any) -> subprocess.Popen:
        return subprocess.Popen(["nohup", *words], **options)

    with Supervised(recipe, "--nproc-per-node", "2", start=start) as supervised:
        supervised.reach(7)
        os.killpg(supervised.process.pid, signal.SIGHUP)
        for rank in supervised.ranks():
            rank.send_signal(signal.SIGHUP)
        assert supervised.wait() == 0, supervised.log.read_text()
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, STEPS + 1)) and not supervised.lines()


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_supervisor(tmp_path):
    with Supervised(recipe_of(tmp_path, endless.STEPS), "--nproc-per-node", "2") as supervised:
        supervised.reach(7)
        supervised.process.kill()
        end = time.monotonic() + LIMIT
        while supervised.ranks():
            assert time.monotonic() < end
            time.sleep(0.1)
    assert "stopped after step" in supervised.log.read_text()  # whichever rank noticed first


@pytest.mark.slow
@pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing() or "-")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_is_done_without_and_taken_in_when_it_returns(tmp_path, lost):
    recipe = recipe_of(tmp_path, endless.STEPS)
    with hosts.Hosts(2) as two:

        def start(host: hosts.Host) -> subprocess.Popen:
            words = ["--recipe", str(recipe), "--nproc-per-node", "1", "--max-nodes", "2"]
            return two.start(host, sys.executable, SUPERVISE, *words)

        def trains_on(ranks: int, times: int) -> None:
            words = f", on {ranks} rank{'s' if ranks > 1 else ''} at"
            end = time.monotonic() + LIMIT
            while two.output().count(words) < times:
                assert time.monotonic() < end, two.output()
                time.sleep(0.2)
            step = max(endless.steps_of(tmp_path / "run"), default=0)
            endless.reach(tmp_path / "run", step + 7, lambda: True, LIMIT)

        supervisors = [start(host) for host in two.all]
        trains_on(2, 1)
        alone = two.output().count(", on 1 rank at") + 1
        subprocess.run(two[lost].command("kill", "-9", "-1"), check=False, capture_output=True)
        supervisors[lost].wait(LIMIT)
        trains_on(1, alone)
        start(two[lost])
        trains_on(2, 2)
    steps = endless.steps_of(tmp_path / "run")
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"
