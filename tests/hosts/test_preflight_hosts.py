"""launchers/preflight.py on two hosts with a network between them, each of which may see other files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, hosts, launch
from tests.helpers.data import tiny_features

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing() or "-")]
PREFLIGHT = str(ROOT / "launchers" / "preflight.py")
NO_LAUNCHER = dict.fromkeys(["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A recipe and its data, a shard of equal size with other bytes, and a table that hides a host from the other."""
    folder = tmp_path_factory.mktemp("preflight-hosts")
    tiny_features.write_features(folder / "toy", [tiny_features.sample(i) for i in range(12)])
    source = {"dir": str(folder / "toy"), "task": {"name": "classification", "text": "captions"}}
    recipe = {
        "run_dir": str(folder / "run"),
        "backbone": {"name": "features"},
        "method": {"name": "ga_net", "r": 4},
        "data": {"sources": [source], "validation": [source], "global_batch": 12, "workers": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "other.tar").write_bytes(bytes((folder / "toy" / SHARD).stat().st_size))
    (folder / "etc-hosts").write_text("127.0.0.1 localhost\n10.201.0.1 hosta\n127.0.1.1 hostb\n")
    return folder


SHARD = "toy-train-000001.tar"


def errors(result: launch.Result) -> list[str]:
    return [line.removeprefix("error: ") for line in result.output.splitlines() if line.startswith("error: ")]


def test_a_shard_with_other_bytes_on_one_host_and_a_name_that_only_that_host_reaches(folder):
    """hostb's own name leads to its loopback device, as Debian's installer sets it up: gloo would hang there."""
    out = folder / "report.json"
    shown = {"hostb": {folder / "toy" / SHARD: folder / "other.tar", Path("/etc/hosts"): folder / "etc-hosts"}}
    with hosts.Hosts(2, shown) as two:
        each = [{**NO_LAUNCHER, **own} for own in hosts.slurm(two, [2, 1])]
        places = [two[0].pid, two[0].pid, two[1].pid]
        words = ["--recipe", str(folder / "recipe.yaml"), "--json", str(out)]
        result = launch.run_forked(PREFLIGHT, *words, each=each, hosts=places, timeout=300)
    assert list(result.codes) == [2, 2, 2], result.tail()
    shard, card = errors(result)
    assert shard.startswith(f"hostb: {folder / 'toy' / SHARD}: sha256"), result.tail()
    assert card.startswith("hostb: its name resolves to 127.0.1.1") and "(net0)" in card, result.tail()
    report = json.loads(out.read_text())
    assert [(node["name"], node["ranks"]) for node in report["nodes"]] == [("hosta", [0, 1]), ("hostb", [2])]
    assert report["not_measured"] == "not measured, since nodes do not reach each other"
    first, second = report["nodes"]
    assert first["facts"]["card"]["address"] == "10.201.0.1" and first["facts"]["card"]["name"] == "net0"
    assert first["data"][f"{folder / 'toy'} train"]["problems"] == []
    assert second["facts"]["shm"]["free"] > 0 and second["clock"][1] < 5


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "srun"])
def test_every_launcher_looks_at_good_hosts(folder, launcher):
    out = folder / f"{launcher}.json"
    words = ["--recipe", str(folder / "recipe.yaml"), "--json", str(out), "--slower", "1e9", "--timeout", "300"]
    with hosts.Hosts(2) as two:
        result = two.run(hosts.launchers(two, [2, 1], [PREFLIGHT, *words])[launcher], timeout=600)
    assert result.code == 0 and not errors(result), result.tail()
    assert result.output.count("all good: 2 nodes, 3 ranks") == 1
    report = json.loads(out.read_text())
    nodes = {node["name"]: node for node in report["nodes"]}
    assert {name: len(node["ranks"]) for name, node in nodes.items()} == {"hosta": 2, "hostb": 1}
    assert len(nodes["hosta"]["within"]) == len(report["sizes"]) and nodes["hostb"]["within"] == []
    assert all(len(node["across"]) == len(report["sizes"]) for node in nodes.values())
    assert {"torch", "deepspeed", "transformers", "peft"} <= set(nodes["hostb"]["facts"]["software"])


@pytest.mark.slow
def test_a_host_that_cannot_import_torch_says_so_and_the_other_does_not_wait_for_ever(tmp_path):
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text('raise ImportError("libtorch_cpu.so: cannot open shared object file")\n')
    with hosts.Hosts(2) as two:
        commands = hosts.launchers(two, [2, 1], [PREFLIGHT, "--timeout", "15"])["srun"]
        path = f"{tmp_path}:{hosts.clean_environment()['PYTHONPATH']}"
        commands = [(h, w, {**env, **({"PYTHONPATH": path} if h is two[1] else {})}) for h, w, env in commands]
        result = two.run(commands, timeout=300)
    assert list(result.codes) == [2, 2, 2], result.tail()
    said = errors(result)
    assert any(line.startswith("hostb: ImportError: libtorch_cpu.so") and "make setup" in line for line in said)
    assert any(line.startswith("rank 2: never came") for line in said), result.tail()
