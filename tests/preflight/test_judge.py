"""What preflight says of nodes, from facts that are written down here."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from mmpeft_ds.preflight import judge, nodes, speed
from mmpeft_ds.preflight.judge import GIB, MIB, Limits
from mmpeft_ds.preflight.nodes import Node

RECIPE = SimpleNamespace(data=SimpleNamespace(workers=2))
FACTS = {
    "software": {"python": "3.11.7", "mmpeft_ds": "0.1.0 (aa)", "torch": "2.13.0", "peft": "0.21.2"},
    "failed": {},
    "recipe": "r1",
    "driver": "580.1",
    "operator": True,
    "cpu": "x86",
    "cores": 64,
    "memory": {"total": 512 * GIB, "free": 500 * GIB},
    "shm": {"total": 256 * GIB, "free": 256 * GIB},
    "disk": {"run_dir": {"path": "/runs/a", "free": 90 * GIB, "problem": ""}},
    "card": {"name": "eth0", "address": "10.0.0.1", "how": "address of the host name", "problem": ""},
    "infiniband": ["mlx5_0"],
    "locked_memory": None,
}


def node(name: str, **facts: Any) -> Node:
    """A good node of two ranks, but for `facts` and the attributes of `Node` among them."""
    own = {k: facts.pop(k) for k in [f.name for f in dataclasses.fields(Node)] if k in facts}
    number = "abcd".index(name[-1])
    made = Node(
        name, [2 * number, 2 * number + 1], ["H200", "H200"], [], {**FACTS, **facts},
        {"data/x train": {"manifest": "m1", "shards": 9, "problems": []}}, (0.001 * number, 0.001),
    )  # fmt: skip
    return dataclasses.replace(made, **own)


def said(*changed: Node, missing: dict[int, str] | None = None) -> list[str]:
    """Problems of nodes a, b and c, some of which are given."""
    given = {n.name: n for n in changed}
    return judge.problems([given.get(n, node(n)) for n in ("a", "b", "c")], missing or {}, RECIPE, Limits())


def test_good_nodes_have_no_problems_and_no_notes():
    assert said() == [] and judge.notes([node("a"), node("b"), node("c")]) == []


WRONG = {
    "software": (
        dict(software=FACTS["software"] | {"peft": "0.20.0"}),
        "b: peft is 0.20.0, on the other nodes 0.21.2",
    ),
    "python": (dict(software=FACTS["software"] | {"python": "3.10.1"}), "b: python is 3.10.1"),
    "checkout": (dict(software=FACTS["software"] | {"mmpeft_ds": "0.1.0 (bb)"}), "b: mmpeft_ds is 0.1.0 (bb)"),
    "import": (dict(failed={"deepspeed": "ImportError: x"}), r"b: deepspeed cannot be imported (ImportError: x)"),
    "recipe": (dict(recipe="r2"), "b: the recipe's hash is r2, on the other nodes r1. Copy"),
    "device": (dict(devices=["CPU", "CPU"]), "b: the devices are CPU, on the other nodes H200"),
    "rank": (
        dict(problems=["local rank 1: this machine shows 1 GPU(s)."]),
        "b: local rank 1: this machine shows 1 GPU",
    ),
    "shard": (
        dict(data={"data/x train": {"manifest": "m1", "shards": 9, "problems": ["data/x/7.tar: missing"]}}),
        "b: data/x/7.tar: missing",
    ),
    "data set": (
        dict(data={"data/x train": {"manifest": "m2", "shards": 9, "problems": []}}),
        "b: data/x/manifest.json has the hash m2, on the other nodes m1",
    ),
    "clock": (dict(clock=(7.0, 0.1)), "b: its clock is 7.0 s ahead of those of the others"),
    "disk": (
        dict(disk={"run_dir": {"path": "/runs/a", "free": 100 * MIB, "problem": ""}}),
        "b: run_dir /runs/a has 100.0 MiB free",
    ),
    "read-only": (
        dict(disk={"run_dir": {"path": "/runs/a", "free": 9 * GIB, "problem": "/runs: cannot be written"}}),
        "b: run_dir /runs: cannot be written",
    ),
    "shm": (dict(shm={"total": 64 * MIB, "free": 64 * MIB}), "b: /dev/shm has 64.0 MiB free"),
    "memlock": (dict(locked_memory=64 << 10), "b: a process may lock 64 KiB of memory; InfiniBand (mlx5_0)"),
    "card": (dict(card={**FACTS["card"], "problem": "its name resolves to 127.0.1.1"}), "b: its name resolves to 127"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_node_is_named_in_one_line(what):
    facts, line = WRONG[what]
    (only,) = said(node("b", **facts))
    assert only.startswith(line)


def test_the_first_node_is_named_where_it_is_the_wrong_one():
    """Offsets are told against its clock, so that all others seem wrong."""
    late = [node("b", clock=(30.0, 0.1)), node("c", clock=(30.1, 0.1))]
    (only,) = said(node("a", clock=(0.0, 0.0)), *late)
    assert only.startswith("a: its clock is 30.0 s behind")


def test_an_offset_that_the_network_may_explain_is_none():
    assert said(node("b", clock=(7.0, 6.5))) == []


def test_of_two_nodes_both_versions_are_told():
    two = [node("a"), node("b", software=FACTS["software"] | {"peft": "0.20.0"})]
    (only,) = judge.problems(two, {}, RECIPE, Limits())
    assert only.startswith("peft is not the same on all nodes: a 0.21.2, b 0.20.0")


def test_ranks_that_did_not_report():
    lines = said(missing={3: "b", 6: "", 7: ""})
    assert [line.split(":")[0] for line in lines] == ["rank 3 on b", "ranks 6, 7"]


def test_what_only_some_setups_need_is_not_asked_of_others():
    assert said(node("b", infiniband=[], locked_memory=64 << 10)) == []
    no_workers = SimpleNamespace(data=SimpleNamespace(workers=0))
    small = [node("a"), node("b", shm={"total": 64 * MIB, "free": 64 * MIB})]
    assert judge.problems(small, {}, no_workers, Limits()) == []
    alone = node("a", card={**FACTS["card"], "problem": "its name resolves to 127.0.1.1"})
    assert judge.problems([alone], {}, RECIPE, Limits()) == []


def test_differences_that_do_no_harm_are_notes():
    other = node("b", driver="570.2", cores=32, operator=False, memory={"total": 64 * GIB, "free": GIB})
    assert judge.problems([node("a"), other, node("c")], {}, RECIPE, Limits()) == []
    lines = judge.notes([node("a"), dataclasses.replace(other, devices=["CPU"]), node("c")])
    assert len(lines) == 4 and all(line.startswith("b: ") for line in lines)


def with_speed(within: dict[str, float], links: dict[tuple[str, str], float]) -> list[Node]:
    """Nodes with an all-gather of so many seconds inside, and so many seconds from one to another."""
    made = []
    for name in sorted({*within, *(n for pair in links for n in pair)}):
        own = {other: t for pair, t in links.items() if name in pair for other in pair if other != name}
        made.append(node(name, within=[within[name]] * len(speed.SIZES) if name in within else [], links=own))
    return made


def test_a_slow_node_is_named_and_its_neighbours_are_not():
    """The ways to it are slow at both ends: the best way of each node decides."""
    ways = {("a", "b"): 0.01, ("b", "c"): 0.01, ("c", "d"): 0.2, ("a", "d"): 0.2}
    (only,) = judge.slow(with_speed({}, ways), Limits())
    assert only.startswith("d: slow: network to the other nodes moves 21.0 MB/s, that of the others 419.4 MB/s")
    (only,) = judge.slow(with_speed({"a": 0.01, "b": 0.01, "c": 0.05}, {}), Limits())
    assert only.startswith("c: slow: all-gather inside it")
    assert judge.slow(with_speed({"a": 0.01, "b": 0.01, "c": 0.025}, {}), Limits()) == []


def test_a_node_that_is_too_slow_for_large_sizes_is_compared_at_the_largest_that_all_have():
    nodes_ = with_speed({"a": 0.01, "b": 0.01, "c": 2.0}, {})
    nodes_[2].within = nodes_[2].within[:3]
    (only,) = judge.slow(nodes_, Limits())
    assert only.startswith("c: slow: all-gather inside it moves 0.3 MB/s, that of the others 52.4 MB/s")


def test_what_is_wrong_on_several_nodes_is_one_line():
    lacking = {"data/x train": {"manifest": "", "shards": 0, "problems": ["data/x/manifest.json: not found"]}}
    assert said(node("a", data=lacking), node("c", data=lacking)) == ["a, c: data/x/manifest.json: not found"]
    everywhere = said(*(node(name, data=lacking) for name in "abc"))
    assert everywhere == ["all nodes: data/x/manifest.json: not found"]


def test_reports_of_ranks_become_nodes():
    part = {"manifest": "m1", "shards": 2, "problems": ["x: missing"]}
    report = {"device": "CPU", "problems": [], "data": {"d train": part}}
    reports = {
        0: report | {"first": 0, "host": "a", "node": FACTS},
        1: report | {"first": 0, "host": "a", "node": None, "data": {"d train": part | {"shards": 1, "problems": []}}},
        2: report | {"first": 2, "host": "a", "node": FACTS},
    }
    first, second = nodes.group(reports)
    assert (first.name, first.ranks, second.name, second.ranks) == ("a (rank 0)", [0, 1], "a (rank 2)", [2])
    assert first.data["d train"] == {"manifest": "m1", "shards": 3, "problems": ["x: missing"]}


def test_the_bandwidth_of_an_all_gather_is_what_a_rank_receives():
    assert speed.bandwidth(2.0, 4_000, 4) == 1_500
