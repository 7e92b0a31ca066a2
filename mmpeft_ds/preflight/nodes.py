"""Nodes, made of what their ranks found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Node:
    """One machine of a run.

    Attributes:
        name: its host name, with the first rank where two nodes have the same.
        ranks: that reported from it.
        devices: of each of them.
        problems: that a rank alone has, such as no GPU left for it, or a recipe that cannot be read.
        facts: of `facts.of_node`; empty where the first rank did not report.
        data: of `facts.of_data`, of all ranks of the node together.
        clock: seconds that it is ahead of the first node, and how far that may be off; None: not known.
        within, across: seconds of all-gathers of `speed.SIZES` in the node, and across nodes as it saw them.
        links: name of another node -> seconds of `speed.LINK` bytes.
    """

    name: str
    ranks: list[int]
    devices: list[str]
    problems: list[str]
    facts: dict[str, Any]
    data: dict[str, dict[str, Any]]
    clock: tuple[float, float] | None = None
    within: list[float] = field(default_factory=list)
    across: list[float] = field(default_factory=list)
    links: dict[str, float] = field(default_factory=dict)


def group(reports: Mapping[int, dict[str, Any]]) -> list[Node]:
    """Nodes in the order of their ranks.

    Args:
        reports: rank -> `facts.of_rank` with `data`, `problems` and, of the first rank of a node, `node`.
    """
    firsts: dict[int, list[int]] = {}
    for rank in sorted(reports):
        firsts.setdefault(reports[rank]["first"], []).append(rank)
    hosts = Counter(reports[ranks[0]]["host"] for ranks in firsts.values())
    nodes = []
    for first, ranks in firsts.items():
        parts = [reports[rank] for rank in ranks]
        host = parts[0]["host"]
        name = host if hosts[host] == 1 else f"{host} (rank {first})"
        problems = list(dict.fromkeys(problem for part in parts for problem in part["problems"]))
        facts = next((part["node"] for part in parts if part.get("node")), {})
        devices = [part["device"] for part in parts]
        nodes.append(Node(name, ranks, devices, problems, facts, _together([part["data"] for part in parts])))
    return nodes


def _together(parts: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Data of a node from the shares of its ranks."""
    data: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, facts in part.items():
            own = data.setdefault(name, {"manifest": facts["manifest"], "shards": 0, "problems": []})
            own["shards"] += facts["shards"]
            own["problems"] += [problem for problem in facts["problems"] if problem not in own["problems"]]
    return data


def add_speed(nodes: Sequence[Node], results: Mapping[int, dict[str, Any]]) -> list[str]:
    """Enter what `speed.measure` gave on each rank; the reasons why it could not be measured."""
    first = {str(node.ranks[0]): node for node in nodes}
    for node in nodes:
        result = results.get(node.ranks[0], {})
        node.within, node.across = result.get("within", []), result.get("across", [])
        node.links = {first[rank].name: seconds for rank, seconds in result.get("links", {}).items()}
    failed = {rank: result["error"] for rank, result in results.items() if "error" in result}
    return [f"rank {rank}: {reason}" for rank, reason in sorted(failed.items())]
