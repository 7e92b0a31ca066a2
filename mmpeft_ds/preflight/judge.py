"""Problems of nodes as sentences: pure functions of the facts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmpeft_ds import recipe as recipes
from mmpeft_ds.preflight import speed
from mmpeft_ds.preflight.nodes import Node

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Limits:
    """Accepted values.

    Attributes:
        clock: seconds that a node's clock may be off.
        disk: free bytes of the run directory and of TMPDIR.
        shm: free bytes of /dev/shm for a rank with loader workers, for tensors that are not contiguous.
        slower: a node is slow where the others are that many times as fast.
    """

    clock: float = 1.0
    disk: int = GIB
    shm: int = 128 * MIB
    slower: float = 3.0


def problems(
    nodes: Sequence[Node], missing: Mapping[int, str], recipe: recipes.Recipe | None, limits: Limits
) -> list[str]:
    """One line for each thing that would end or spoil a run: what, where and how to mend it.

    Args:
        missing: rank -> host, empty where it never came, of those that did not report.
    """
    lines = _silent(missing)
    for node in nodes:
        lines += [f"{node.name}: {problem}" for problem in node.problems]
    known = [node for node in nodes if node.facts]
    for judge in (_imports, _versions, _recipes, _devices, _data):
        lines += judge(known)
    lines += _clocks(known, limits) + _room(known, recipe, limits)
    lines += (network(known) if len(nodes) > 1 else []) + slow(known, limits)
    return _merged(lines, [node.name for node in nodes])


def _merged(lines: Sequence[str], names: Sequence[str]) -> list[str]:
    """Problems that several nodes share, such as data that nobody has prepared, as one line each."""
    on: dict[str, list[str]] = {}
    for line in lines:
        name = next((name for name in names if line.startswith(f"{name}: ")), "")
        on.setdefault(line.removeprefix(f"{name}: ") if name else line, []).extend([name] if name else [])
    return [f"{_listed(where, len(names))}: {line}" if where else line for line, where in on.items()]


def _listed(names: Sequence[str], of: int) -> str:
    if len(names) == of > 1:
        return "all nodes"
    more = f" and {len(names) - 4} more" if len(names) > 5 else ""
    return ", ".join(names[:4] if more else names) + more


def notes(nodes: Sequence[Node]) -> list[str]:
    """One line for each difference between nodes that a run can live with."""
    known = [node for node in nodes if node.facts]
    lines = odd(known, "the NVIDIA driver is", lambda n: n.facts["driver"] or "none")
    lines += odd(known, "a processor is", lambda n: f"{n.facts['cores']} cores of {n.facts['cpu']}")
    if any(node.facts["operator"] for node in known):
        lacking = [node.name for node in known if not node.facts["operator"] and "CPU" in node.devices]
        lines += [
            f"{name}: DeepSpeed's operator is compiled at the first start, in about a minute." for name in lacking
        ]
    memory = {node.name: node.facts["memory"]["total"] for node in known}
    for name, total in memory.items():
        if total < 0.6 * (usual := statistics.median(memory.values())):
            lines.append(f"{name}: has {size(total)} of memory, the other nodes about {size(usual)}.")
    return lines


def odd(nodes: Sequence[Node], what: str, value: Callable[[Node], str], remedy: str = "") -> list[str]:
    """A line for every node whose value is not that of most; where no value is that of most, one line with all."""
    values = {node.name: value(node) for node in nodes}
    counted = Counter(values.values()).most_common()
    if len(counted) < 2:
        return []
    remedy = f" {remedy}" if remedy else ""
    if counted[0][1] == counted[1][1]:
        each = ", ".join(f"{names_of(values, v)} {v}" for v, _ in counted)
        return [f"{what} not the same on all nodes: {each}.{remedy}"]
    usual = counted[0][0]
    return [
        f"{name}: {what} {own}, on the other nodes {usual}.{remedy}" for name, own in values.items() if own != usual
    ]


def names_of(values: Mapping[str, str], wanted: str) -> str:
    """The nodes that have a value: `hosta, hostb`."""
    return ", ".join(name for name, value in values.items() if value == wanted)


def _silent(missing: Mapping[int, str]) -> list[str]:
    came = [
        f"rank {rank} on {host}: came and then fell silent. See what it printed there, or the kernel's log if it was "
        "killed."
        for rank, host in missing.items()
        if host
    ]
    never = [rank for rank, host in missing.items() if not host]
    if never:
        named = f"rank {never[0]}" if len(never) == 1 else f"ranks {', '.join(map(str, never))}"
        came.append(f"{named}: never came. See that the launcher started on every node, and what it printed there.")
    return came


def _imports(nodes: Sequence[Node]) -> list[str]:
    return [
        f"{node.name}: {name} cannot be imported ({reason}). Run make setup there, or start there with the same "
        "environment as elsewhere."
        for node in nodes
        for name, reason in node.facts["failed"].items()
    ]


def _versions(nodes: Sequence[Node]) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for node in nodes for name in node.facts["software"]):
        having = [node for node in nodes if name in node.facts["software"]]
        remedy = "Update the checkout." if name == "mmpeft_ds" else "Install the same on all nodes: make setup."
        lines += odd(having, f"{name} is", lambda n, name=name: n.facts["software"][name], remedy)
    return lines


def _recipes(nodes: Sequence[Node]) -> list[str]:
    read = [node for node in nodes if node.facts["recipe"]]
    return odd(read, "the recipe's hash is", lambda n: n.facts["recipe"], "Copy the recipe to all nodes.")


def _devices(nodes: Sequence[Node]) -> list[str]:
    remedy = "Start on equal nodes, or hide the GPUs: CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu."
    return odd(nodes, "the devices are", lambda n: ", ".join(sorted(set(n.devices))), remedy)


def _data(nodes: Sequence[Node]) -> list[str]:
    lines = []
    for node in nodes:
        for facts in node.data.values():
            lines += [f"{node.name}: {problem}" for problem in facts["problems"]]
    for name in dict.fromkeys(name for node in nodes for name in node.data):
        having = [node for node in nodes if node.data.get(name, {}).get("manifest")]
        what, remedy = f"{name.rsplit(' ', 1)[0]}/manifest.json has the hash", "Copy the same data set to all nodes."
        lines += odd(having, what, lambda n, name=name: n.data[name]["manifest"], remedy)
    return list(dict.fromkeys(lines))


def _clocks(nodes: Sequence[Node], limits: Limits) -> list[str]:
    """Against the middle of all nodes, so that a wrong clock of the first one does not make all others wrong."""
    known = {node.name: node.clock for node in nodes if node.clock}
    middle = sorted(offset for offset, _ in known.values())[(len(known) - 1) // 2] if known else 0.0
    lines = []
    for name, (offset, off) in known.items():
        apart = offset - middle
        if abs(apart) - off > limits.clock:
            others = "those of the others"
            if len(known) == 2:  # which of them is wrong cannot be known
                others = f"that of {next(n for n in known if n != name)}"
            way = "ahead of" if apart > 0 else "behind"
            lines.append(
                f"{name}: its clock is {abs(apart):.1f} s {way} {others}. Let all nodes follow a time server, such as "
                "by chrony."
            )
    return lines


def _room(nodes: Sequence[Node], recipe: recipes.Recipe | None, limits: Limits) -> list[str]:
    lines = []
    for node in nodes:
        for name, place in node.facts["disk"].items():
            if place["problem"]:
                lines.append(f"{node.name}: {name} {place['problem']}")
            elif place["free"] < limits.disk:
                lines.append(f"{node.name}: {name} {place['path']} has {size(place['free'])} free. Make room there.")
        shm, wanted = node.facts["shm"], limits.shm * len(node.ranks)
        if recipe and recipe.data.workers and shm and shm["free"] < wanted:
            lines.append(
                f"{node.name}: /dev/shm has {size(shm['free'])} free; tensors of loader workers that are not "
                f"contiguous, and outside of Linux all large ones, pass through it. Give the container "
                f"{size(wanted)} (docker run --shm-size), or set data.workers=0."
            )
        limit = node.facts["locked_memory"]
        if node.facts["infiniband"] and limit is not None and limit < GIB:
            lines.append(
                f"{node.name}: a process may lock {size(limit)} of memory; InfiniBand "
                f"({', '.join(node.facts['infiniband'])}) needs more. Set ulimit -l unlimited, in a container "
                "--ulimit memlock=-1."
            )
    return lines


def network(nodes: Sequence[Node]) -> list[str]:
    """Nodes whose network card the others do not reach; nothing can be measured across nodes then."""
    return [f"{node.name}: {node.facts['card']['problem']}" for node in nodes if node.facts["card"]["problem"]]


def slow(nodes: Sequence[Node], limits: Limits) -> list[str]:
    """Nodes whose all-gather inside, or whose best way to another node, is much slower than that of the others."""
    last = min((len(n.within) for n in nodes if n.within), default=0) - 1  # a slow node has fewer sizes
    within = {n.name: speed.bandwidth(n.within[last], speed.SIZES[last], len(n.ranks)) for n in nodes if n.within}
    ways = {n.name: max(speed.LINK / max(t, 1e-9) for t in n.links.values()) for n in nodes if n.links}
    lines = []
    for rates, what in ((within, "all-gather inside it"), (ways, "network to the other nodes")):
        for name, rate in rates.items():
            others = [r for other, r in rates.items() if other != name]
            if others and rate * limits.slower < (usual := statistics.median(others)):
                lines.append(
                    f"{name}: slow: {what} moves {_shown(rate)}, that of the others {_shown(usual)}. See what else "
                    "runs there, its cables and link speed."
                )
    return lines


def _shown(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"


def size(count: float) -> str:
    """A number of bytes: `1.5 GiB`, `64.0 MiB`, `8 KiB`."""
    if count < MIB:
        return f"{count / 1024:,.0f} KiB"
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"
