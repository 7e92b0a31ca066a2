"""launchers/preflight.py on two ranks: a good pair, planted faults, and ranks that are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers import launch
from tests.helpers.data import tiny_features

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.preflight"
QUICK = "--slower=1e9"  # how fast this machine is decides nothing here


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> list[Path]:
    """Working directories of two nodes with the same data, and a recipe that names it."""
    folder = tmp_path_factory.mktemp("preflight")
    source = {"dir": "toy", "task": {"name": "classification", "text": "captions"}}
    recipe = {
        "run_dir": "run",
        "backbone": {"name": "features"},
        "method": {"name": "ga_net", "r": 4},
        "data": {"sources": [source], "validation": [source], "global_batch": 12, "workers": 0},
    }
    for name in ("a", "b"):
        (folder / name).mkdir()
        tiny_features.write_features(folder / name / "toy", [tiny_features.sample(i) for i in range(12)])
        (folder / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [folder / "a", folder / "b"]


def ranks_of(nodes: list[Path], **faults: object) -> list[dict[str, str]]:
    """Variables of one rank on each of two nodes; `faults` are the second's."""
    planted = [{"host": "nodea", "folder": str(nodes[0])}, {"host": "nodeb", "folder": str(nodes[1]), **faults}]
    each = [{"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "PLANTED": json.dumps(p)} for p in planted]
    return [{"RANK": str(rank), **variables} for rank, variables in enumerate(each)]


def errors(result: launch.Result) -> list[str]:
    return [line.removeprefix("error: ") for line in result.output.splitlines() if line.startswith("error: ")]


@pytest.fixture
def card(monkeypatch):
    """The name of a host that exists in this test alone has no address."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def test_two_good_nodes(nodes, card, tmp_path):
    out = tmp_path / "out.json"
    result = launch.run_forked(
        SCRIPT, "--recipe", "recipe.yaml", QUICK, "--json", str(out), each=ranks_of(nodes), timeout=120
    )
    assert list(result.codes) == [0, 0] and not errors(result), result.tail()
    assert "all good: 2 nodes, 2 ranks" in result.output and "across 2 nodes" in result.output
    report = json.loads(out.read_text())
    assert report["good"] and [node["name"] for node in report["nodes"]] == ["nodea", "nodeb"]
    first, second = report["nodes"]
    assert first["facts"]["software"] == second["facts"]["software"] and {"torch", "deepspeed", "peft"} <= set(
        first["facts"]["software"]
    )
    assert first["data"]["toy train"]["shards"] == 3 and first["data"] == second["data"]
    assert all(seconds > 0 for seconds in first["across"]) and len(first["across"]) == len(report["sizes"])
    assert abs(second["clock"][0]) <= second["clock"][1] + 0.5


def test_each_planted_fault_is_named_with_its_node(nodes, card):
    shard = nodes[1] / "toy" / "toy-train-000001.tar"
    content = shard.read_bytes()
    shard.unlink()
    faults = {"clock": 3600, "versions": {"peft": "0.0.1"}, "failed": {"webdataset": "OSError: libfoo.so"}}
    try:
        words = ("--recipe", "recipe.yaml", "--no-speed")
        result = launch.run_forked(SCRIPT, *words, each=ranks_of(nodes, **faults), timeout=120)
    finally:
        shard.write_bytes(content)
    assert list(result.codes) == [2, 2], result.tail()
    said = errors(result)
    assert len(said) == 4 and "Traceback" not in result.output, result.tail()
    for part in (
        "nodeb: webdataset cannot be imported (OSError: libfoo.so)",
        "peft is not the same on all nodes: nodea ",
        "nodeb: toy/toy-train-000001.tar: missing",
        "nodeb: its clock is ",
    ):
        assert sum(line.startswith(part) for line in said) == 1, said


def test_a_rank_that_dies_and_one_that_never_came_are_named_and_not_waited_for(nodes, card):
    each = ranks_of(nodes, dies=True)
    for variables in each:
        variables["WORLD_SIZE"] = "3"
    result = launch.run_forked(SCRIPT, "--recipe", "recipe.yaml", "--timeout", "4", each=each, timeout=120)
    assert not result.killed and result.codes[0] == 2 and result.codes[1] < 0, result.tail()
    said = errors(result)
    assert any(line.startswith("rank 1 on nodeb: came and then fell silent") for line in said), said
    assert any(line.startswith("rank 2: never came") for line in said), said
    assert "nodea" in result.output and "ranks are missing" in result.output, "what is known is shown"


def test_a_recipe_that_one_node_lacks_is_told_there(nodes, card):
    (nodes[1] / "recipe.yaml").rename(nodes[1] / "away.yaml")
    try:
        result = launch.run_forked(SCRIPT, "--recipe", "recipe.yaml", "--no-speed", each=ranks_of(nodes), timeout=120)
    finally:
        (nodes[1] / "away.yaml").rename(nodes[1] / "recipe.yaml")
    assert list(result.codes) == [2, 2], result.tail()
    assert [line[:20] for line in errors(result)] == ["nodeb: recipe.yaml: "], result.tail()
