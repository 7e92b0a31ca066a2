"""Under Slurm itself, on two nodes: srun trains as one host does; jobs stop, go on, and are queued again."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, hosts, launch, slurm
from tests.helpers.runs import endless

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "-"),
]
TRAIN = f"{sys.executable} {ROOT}/launchers/train.py"
SUPERVISE = f"{sys.executable} {ROOT}/launchers/supervise.py"
RESTARTED = ("--nodes=2", "--ntasks-per-node=1", "--requeue", "--no-kill")
ALIVE = ("PENDING", "RUNNING", "COMPLETING")
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


@pytest.fixture(scope="module")
def cluster():
    with hosts.Hosts(2) as two, slurm.Cluster(two) as cluster:
        yield cluster


def test_srun_trains_on_two_nodes_as_on_one_host(cluster, tmp_path):
    """Two tasks on one node and one on the other, found out of the variables that this Slurm sets."""
    recipe = endless.prepare(tmp_path, deepspeed="ds_configs/zero3_nodes.json")
    words = [*shlex.split(TRAIN), "--recipe", str(recipe), "--set", "optim.max_steps=6", "--set"]
    result = cluster.srun("--nodes=2", "--ntasks=3", *words, f"run_dir={tmp_path / 'slurm'}")
    assert result.code == 0 and not result.killed, result.tail()
    alone = launch.run(words[1], *words[2:], f"run_dir={tmp_path / 'alone'}", ranks=3)
    assert alone.code == 0, alone.tail()
    assert losses_of(tmp_path / "slurm") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-6)
    assert len(losses_of(tmp_path / "slurm")) == 6


def test_bad_input_is_one_line_a_node_and_code_2(cluster, tmp_path):
    recipe = endless.prepare(tmp_path)
    result = cluster.srun("--ntasks=4", *shlex.split(TRAIN), "--recipe", str(recipe), "--set", "optim.lrr=1")
    assert result.code == 2, result.tail()
    told = [line for line in result.output.splitlines() if not line.startswith("srun: ")]
    assert len(told) == 2 and all("optim.lrr: unknown key" in line for line in told), result.tail()


def test_a_signal_before_the_limit_saves_and_the_same_script_goes_on_with_fewer_tasks(cluster, tmp_path):
    recipe = endless.prepare(tmp_path)
    run, script = tmp_path / "run", script_of(tmp_path, f"srun {TRAIN} --recipe {recipe}")
    job = cluster.submit(script, "--ntasks=3")
    reach(cluster, script, job, 8, *ALIVE)
    cluster.command("scancel", "--signal=TERM", str(job))  # to the steps and not the script, as `--signal=TERM@120`
    assert cluster.wait(job, *ENDED) == "COMPLETED", cluster.printed(script)
    last = endless.steps_of(run)[-1]
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{last:08d}"
    job = cluster.submit(script, "--ntasks=2")
    reach(cluster, script, job, last + 5, *ALIVE)
    cluster.command("scancel", str(job))
    cluster.wait(job, *ENDED)
    assert f"continues after step {last}" in cluster.printed(script)
    assert_each_step_once(run)


def test_a_killed_rank_ends_the_step_and_is_named(cluster, tmp_path):
    recipe = endless.prepare(tmp_path, stall=8, timeout=24)
    script = script_of(tmp_path, f"srun {TRAIN} --recipe {recipe}")
    job = cluster.submit(script, "--ntasks=3")
    reach(cluster, script, job, 8, *ALIVE)
    cluster.machines.run([(cluster.machines[1], ["pkill", "-KILL", "-f", "launchers/train.py"], {})], 30)
    assert cluster.wait(job, *ENDED) == "FAILED"
    told = cluster.printed(script)
    assert "rank 2 on hostb" in told and "Traceback" not in told, told


def test_the_supervisor_has_its_job_queued_again(cluster, tmp_path):
    """The script of docs/restart.md: a signal before the limit saves, and the job starts anew and continues."""
    run, script = supervised(tmp_path)
    job = cluster.submit(script, *RESTARTED)
    reach(cluster, script, job, 8, *ALIVE)
    cluster.command("scancel", "--signal=USR1", str(job))
    cluster.wait(job, "PENDING")
    last = endless.steps_of(run)[-1]
    cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm lets it wait for two minutes
    reach(cluster, script, job, last + 5, *ALIVE)
    cluster.command("scancel", str(job))
    cluster.wait(job, "PENDING", *ENDED)
    cluster.emptied("supervise.py")
    assert cluster.state(job) == "CANCELLED", "whoever cancels a job does not want it again"
    assert_each_step_once(run)


def test_a_supervised_job_goes_on_without_a_node_that_is_lost(tmp_path):
    run, script = supervised(tmp_path)
    with hosts.Hosts(2) as two, slurm.Cluster(two) as cluster:
        job = cluster.submit(script, *RESTARTED)
        reach(cluster, script, job, 8, *ALIVE)
        two.end(two[1])
        cluster.lost(two[1])  # before that Slurm ends nothing
        last = endless.steps_of(run)[-1]
        reach(cluster, script, job, last + 20, "RUNNING")
        cluster.command("scancel", str(job))
        cluster.wait(job, *ENDED)
        told = cluster.printed(script)
    assert_each_step_once(run)
    assert "on 1 rank" in told, told


def reach(cluster: slurm.Cluster, script: Path, job: int, step: int, *states: str) -> None:
    """Wait until the run of a script has done a step, while its job is in one of the states."""

    def living() -> bool:
        state = cluster.state(job)
        assert state in states, f"job {job} is {state or 'unknown'}:\n{cluster.printed(script)[-4000:]}"
        return True

    endless.reach(script.parent / "run", step, living)


def supervised(folder: Path) -> tuple[Path, Path]:
    """Run directory, and the batch script of docs/restart.md, with one rank a node."""
    recipe = endless.prepare(folder)
    command = (
        f"srun --no-kill --kill-on-bad-exit=0 {SUPERVISE} --nproc-per-node 1 --max-nodes 2 --requeue --recipe {recipe}"
    )
    return folder / "run", script_of(folder, command)


def script_of(folder: Path, command: str) -> Path:
    """A batch script of one command; options are those of `sbatch`."""
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{command}\n")
    return script


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_each_step_once(run: Path) -> None:
    steps = endless.steps_of(run)
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"
