"""The steps of preflight: every rank collects facts, and rank 0 gathers them, judges them and prints."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed import processes
from mmpeft_ds.files import write_json
from mmpeft_ds.preflight import clock, facts, judge, report, speed
from mmpeft_ds.preflight.imports import Probe
from mmpeft_ds.preflight.nodes import Node, add_speed, group
from mmpeft_ds.preflight.notes import Notes


@dataclass(frozen=True)
class Asked:
    """Options of the command line.

    Attributes:
        recipe: names the data, run_dir and loader workers; None: they are not looked at.
        recipe_problem: why this rank could not read it, or empty.
        patience: seconds without a sign of life after which a rank is given up.
        speed: measure all-gathers.
        json: file for the numbers, `-` to print them in place of the tables, or None.
        limits: what is accepted.
    """

    recipe: recipes.Recipe | None = None
    recipe_problem: str = ""
    patience: float = 60.0
    speed: bool = True
    json: str | None = None
    limits: judge.Limits = judge.Limits()


def run(asked: Asked) -> int:
    """Look at all nodes together. Collective over all ranks that a launcher has started.

    Returns:
        0 where all is good, else 2, on every rank; rank 0 has printed the reasons.

    Raises:
        BadInput: rank 0 cannot be reached, or has ended.
    """
    processes.environment()
    leads = os.environ["LOCAL_RANK"] == "0"
    probe = Probe() if leads else None  # before CUDA is in use, and before the notes, which start threads
    own = facts.of_rank()
    with processes.saying_who_is_awaited(min(60.0, asked.patience / 2)):
        notes = Notes(own["rank"], int(os.environ["WORLD_SIZE"]), asked.patience)
        notes.write(f"here/{own['rank']}", socket.gethostname())
    own["problems"] = [text for text in (asked.recipe_problem, own.pop("device_problem")) if text]
    own["data"] = facts.of_data(asked.recipe, own["local_rank"], own["local_size"], notes.working)
    own["node"] = facts.of_node(asked.recipe, probe, asked.patience, notes.working) if probe else None
    notes.write(f"facts/{own['rank']}", own)
    return _lead(notes, asked, own) if own["rank"] == 0 else _follow(notes, asked, own, leads)


def _follow(notes: Notes, asked: Asked, own: dict[str, Any], leads: bool) -> int:
    """The part of every other rank after its facts."""
    plan = notes.read("plan")
    if leads and own["rank"] in plan["clocks"]:
        clock.answer(notes)
    if notes.read("speed"):
        result = speed.measure(notes.store, own["rank"], plan["nodes"], _device(own), asked.patience)
        notes.write(f"speeds/{own['rank']}", result)
    # Rank 0 measures as long as the others, and waits for a collective that never ends as long as patience says.
    code = notes.read("code", 3 * asked.patience)
    notes.leave(plan["ranks"])
    return code


def _lead(notes: Notes, asked: Asked, own: dict[str, Any]) -> int:
    """The part of rank 0."""
    world = notes.world_size
    reports = notes.collect("facts", range(world))
    missing = {rank: _host(notes, rank) for rank in range(world) if rank not in reports}
    nodes = group(reports)
    leaders = [node.ranks[0] for node in nodes if node.facts]
    notes.write("plan", {"nodes": [node.ranks for node in nodes], "clocks": leaders, "ranks": len(reports)})
    silence, results = _measure(notes, asked, own, nodes, leaders, missing)
    failed = add_speed(nodes, results)
    problems = judge.problems(nodes, missing, asked.recipe, asked.limits)
    problems += [f"all-gather failed: {line}" for line in failed[:3]]
    code = 2 if problems else 0
    _say(asked, nodes, missing, silence, problems)
    notes.write("code", code)
    notes.leave(len(reports))
    return code


def _measure(
    notes: Notes, asked: Asked, own: dict[str, Any], nodes: list[Node], leaders: list[int], missing: dict[int, str]
) -> tuple[str, dict[int, dict[str, Any]]]:
    """Clocks and speed; why the latter was not measured, or its result on each rank."""
    apart = clock.offsets(notes, leaders)
    for node in nodes:
        node.clock = apart.get(node.ranks[0])
    missing |= {rank: _host(notes, rank) for rank in leaders if rank not in apart}
    silence = ""
    if not asked.speed:
        silence = "not asked for"
    elif notes.world_size == 1:
        silence = "there is one rank"
    elif missing:
        silence = "not measured, since ranks are missing"
    elif len(nodes) > 1 and judge.network(nodes):
        silence = "not measured, since nodes do not reach each other"
    elif len({device == "CPU" for node in nodes for device in node.devices}) > 1:
        silence = "not measured, since ranks have different devices"
    elif any("none" in node.devices for node in nodes):
        silence = "not measured, since ranks have no device"
    notes.write("speed", not silence)
    if silence:
        return silence, {}
    ranks = [rank for node in nodes for rank in node.ranks]
    result = speed.measure(notes.store, 0, [node.ranks for node in nodes], _device(own), asked.patience)
    notes.write("speeds/0", result)
    results = notes.collect("speeds", ranks)
    missing |= {rank: _host(notes, rank) for rank in ranks if rank not in results}
    return "failed" if "error" in result else "", results


def _say(asked: Asked, nodes: list[Node], missing: dict[int, str], silence: str, problems: list[str]) -> None:
    remarks = judge.notes(nodes)
    content = report.as_json(nodes, missing, silence, problems, remarks)
    if asked.json == "-":
        print(json.dumps(content, indent=1))
    else:
        print(report.text(nodes, silence))
        for line in remarks:
            print(f"note: {line}")
    if asked.json not in (None, "-"):
        write_json(Path(asked.json), content)
    sys.stdout.flush()
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    ranks = sum(len(node.ranks) for node in nodes)
    if not problems and asked.json != "-":
        print(f"all good: {len(nodes)} node{'s' * (len(nodes) != 1)}, {ranks} rank{'s' * (ranks != 1)}")
    sys.stdout.flush()
    sys.stderr.flush()


def _host(notes: Notes, rank: int) -> str:
    """Host of a rank that has gone silent; empty if it never reported."""
    name = f"here/{rank}"
    return json.loads(notes.store.get(name)) if notes.store.check([name]) else ""


def _device(own: dict[str, Any]) -> torch.device:
    device = processes.own_device()[1]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
