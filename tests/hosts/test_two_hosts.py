"""Training on two hosts, joined by a network that is really there, gives what the same ranks give on one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from mmpeft_ds import recipe as recipes
from tests.helpers import ROOT, hosts, launch
from tests.helpers.data import tiny_features
from tests.helpers.runs import tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing() or "-")]
TRAIN = str(ROOT / "launchers" / "train.py")
SCRIPT = "tests.helpers.rank_scripts.train_on_nodes"
STEPS = 4
NO_LAUNCHER = dict.fromkeys(["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two recipes: towers that ZeRO-3 splits, and a graph over the batch of all ranks."""
    folder = tmp_path_factory.mktemp("hosts")
    tiny_vqa.prepare(folder)
    tiny_features.write_features(folder / "toy", [tiny_features.sample(i) for i in range(24)])
    source = {"dir": str(folder / "toy"), "task": {"name": "classification", "text": "captions"}}
    graph = {
        "run_dir": "",
        "backbone": {"name": "features"},
        "method": {"name": "ga_net", "r": 4, "tau": 0.2},
        "data": {"sources": [source], "validation": [source], "global_batch": 12, "workers": 0},
        "optim": {"lr": 0.03, "warmup": 0.0},
    }
    towers = recipes.to_dict(recipes.load(folder / "recipe.yaml"))
    for name, recipe in {"towers": towers, "graph": graph}.items():
        recipe["optim"]["max_steps"] = STEPS
        recipe["engine"] = {"deepspeed": "ds_configs/zero3_nodes.json", "threads": 1}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def variables_of(ranks: int) -> list[dict[str, str]]:
    """What a launcher gives to ranks on one host."""
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)} for rank in range(ranks)]


def losses_of(run: Path) -> list[float]:
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS
    return losses


@pytest.fixture(scope="module")
def one_host(folder):
    """Losses of the same number of ranks on this machine: (recipe, ranks) -> losses."""
    known: dict[tuple[str, int], list[float]] = {}

    def of(name: str, ranks: int) -> list[float]:
        if (name, ranks) not in known:
            run = folder / f"{name}-{ranks}"
            words = ["--recipe", str(folder / f"{name}.yaml"), "--set", f"run_dir={run}"]
            result = launch.run_forked(TRAIN, *words, each=variables_of(ranks))
            assert result.code == 0, result.tail()
            known[name, ranks] = losses_of(run)
        return known[name, ranks]

    return of


def test_a_host_stays_when_all_that_runs_on_it_is_killed_and_goes_with_its_power():
    with hosts.Hosts(1) as one:
        host = one[0]
        subprocess.run(host.command("kill", "-9", "-1"), check=False)
        assert subprocess.run(host.command("hostname"), capture_output=True, text=True).stdout == "hosta\n"
        one.end(host)
        one.holders[-1].wait(10)
        assert subprocess.run(host.command("hostname"), capture_output=True).returncode  # negative control


def test_three_tasks_of_slurm_on_unequal_nodes_train_as_on_one_host(folder, one_host):
    """`2,1` tasks: a node's number of tasks is its own, so that no group of two is asked for on a node of one."""
    run = folder / "slurm"
    with hosts.Hosts(2) as two:
        places = [two[0].pid, two[0].pid, two[1].pid]
        words = ["--recipe", str(folder / "graph.yaml"), "--set", f"run_dir={run}"]
        given = [{**NO_LAUNCHER, **own} for own in hosts.slurm(two, [2, 1])]
        result = launch.run_forked(TRAIN, *words, each=given, hosts=places, timeout=300)
    assert result.code == 0 and not result.killed, result.tail()
    assert losses_of(run) == pytest.approx(one_host("graph", 3), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "srun"])
def test_every_launcher_trains_on_hosts_of_two_ranks_and_one(folder, one_host, launcher):
    names = ["towers", "graph"]
    with hosts.Hosts(2) as two:
        words = [f"{folder / name}.yaml={folder / f'{launcher}-{name}'}" for name in names]
        commands = hosts.launchers(two, [2, 1], ["-m", SCRIPT, *words])[launcher]
        result = two.run(commands, timeout=600)
    assert result.code == 0 and not result.killed, result.tail()
    # Two and one: no copy of the base fits into a node of each.
    assert "rank 2 of 3 on hostb: rank 0 of 1 there, copies of the base split over 1" in result.output
    assert "rank 1 of 3 on hosta: rank 1 of 2 there, copies of the base split over 1" in result.output
    for name in names:
        assert losses_of(folder / f"{launcher}-{name}") == pytest.approx(one_host(name, 3), rel=1e-6), name


@pytest.mark.slow
def test_each_host_keeps_its_copy_of_the_base(folder, one_host):
    """Two ranks on each: hpZ gathers inside a host, and losses are those of four ranks that share one copy."""
    run = folder / "copies"
    with hosts.Hosts(2) as two:
        commands = hosts.launchers(two, [2, 2], ["-m", SCRIPT, f"{folder / 'towers.yaml'}={run}"])["srun"]
        result = two.run(commands, timeout=600)
    assert result.code == 0 and not result.killed, result.tail()
    for rank in range(4):
        assert (
            f"rank {rank} of 4 on host{'ab'[rank // 2]}: rank {rank % 2} of 2 there, copies of the base split over 2"
            in (result.output)
        )
    assert losses_of(run) == pytest.approx(one_host("towers", 4), rel=1e-6)
