"""Printed report and JSON of preflight.py."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mmpeft_ds.console import one_line
from mmpeft_ds.preflight import speed
from mmpeft_ds.preflight.judge import size as shown
from mmpeft_ds.preflight.nodes import Node

WIDTH = 220  # of the text; a table takes no more than it needs


def text(nodes: Sequence[Node], silence: str) -> str:
    """The table of nodes, and that of all-gathers or the reason why there is none."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=WIDTH)
    known = [node for node in nodes if node.facts]
    if known:
        console.print(_table(known))
    console.print(_speeds(known) if any(n.within or n.across for n in known) else f"all-gather: {silence}")
    return out.getvalue().rstrip("\n")


def _table(nodes: Sequence[Node]) -> Any:
    """A column for each fact and a row for each node."""
    from rich.table import Table

    table = Table(title=one_line("Nodes"), title_justify="left")
    rows = [_cells(node) for node in nodes]
    for cells in rows[1:]:  # most nodes are as the first one
        if cells["software"] == rows[0]["software"]:
            cells["software"] = f"as {nodes[0].name}"
    for name in rows[0]:
        table.add_column(name, no_wrap=True)
    for cells in rows:
        table.add_row(*cells.values())
    return table


def _cells(node: Node) -> dict[str, str]:
    facts = node.facts
    software = facts["software"]
    versions = "\n".join(f"{name} {software.get(name, '-')}" for name in software)
    data = "\n".join(_data_cell(name, part) for name, part in node.data.items())
    offset, off = node.clock or (None, 0.0)
    limit = facts["locked_memory"]
    return {
        "node": f"{node.name}\nrank{'s' * (len(node.ranks) > 1)} {_ranges(node.ranks)}",
        "device": "\n".join(_counted(node.devices)) + (f"\ndriver {facts['driver']}" if facts["driver"] else "")
        + f"\n{facts['cores']} cores",
        "software": versions + f"\noperator {'compiled' if facts['operator'] else 'not compiled'}",
        "data": data or "no recipe given",
        "clock": "-" if offset is None else f"{offset:+.3f} s\n± {off:.3f} s",
        "free": "\n".join(
            [f"memory {shown(facts['memory']['free'])} of {shown(facts['memory']['total'])}"]
            + [f"{name} {shown(place['free'])}" for name, place in facts["disk"].items()]
            + ([f"/dev/shm {shown(facts['shm']['free'])}"] if facts["shm"] else [])
        ),
        "network": f"{facts['card']['name']} {facts['card']['address']}\nby {facts['card']['how']}\n"
        f"InfiniBand {', '.join(facts['infiniband']) or 'none'}\n"
        f"may lock {'all memory' if limit is None else shown(limit)}",
    }  # fmt: skip


def _data_cell(name: str, part: dict[str, Any]) -> str:
    state = f"{len(part['problems'])} wrong" if part["problems"] else "good"
    return f"{name}\n  manifest {part['manifest'] or 'missing'}, {part['shards']} shards, {state}"


def _speeds(nodes: Sequence[Node]) -> Any:
    """A row for each size: time and bandwidth inside each node and across."""
    from rich.table import Table

    title = f"All-gather, median of {speed.REPETITIONS} (bandwidth: what each rank receives)"
    table = Table(title=one_line(title), title_justify="left")
    within = [node for node in nodes if node.within]
    across = next((node for node in nodes if node.across), None)
    columns = [(f"inside {n.name}, {len(n.ranks)} ranks", n.within, len(n.ranks)) for n in within]
    if across:
        columns.append((f"across {len(nodes)} nodes", across.across, len(nodes)))
    table.add_column("bytes", justify="right")
    for name, _, _ in columns:
        table.add_column(name, justify="right")
    for i, size in enumerate(speed.SIZES):
        table.add_row(f"{size:,}", *(_speed_cell(seconds[i : i + 1], size, ranks) for _, seconds, ranks in columns))
    return table


def _speed_cell(seconds: Sequence[float], size: int, ranks: int) -> str:
    if not seconds:
        return "-"
    time = f"{seconds[0] * 1e6:,.0f} us" if seconds[0] < 0.1 else f"{seconds[0]:.2f} s"
    return f"{time}, {speed.bandwidth(seconds[0], size, ranks) / 1e6:,.1f} MB/s"


def _counted(devices: Sequence[str]) -> list[str]:
    return [f"{devices.count(d)} x {d}" if d not in ("CPU", "none") else d for d in dict.fromkeys(devices)]


def _ranges(ranks: Sequence[int]) -> str:
    """`0-7`, or `0, 2` where they are not neighbours."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))


def as_json(
    nodes: Sequence[Node], missing: dict[int, str], silence: str, problems: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    """The same as a JSON-able mapping; times of all-gathers are in seconds, in the order of `sizes`."""
    return {
        "good": not problems,
        "problems": list(problems),
        "notes": list(notes),
        "missing": {str(rank): host for rank, host in missing.items()},
        "sizes": list(speed.SIZES),
        "repetitions": speed.REPETITIONS,
        "not_measured": silence,
        "nodes": [asdict(node) for node in nodes],
    }
