"""Identification of the rank that the others wait for, from each rank's last report."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from mmpeft_ds.owner import Owner

FRAMES = 24  # innermost frames of a stack that are reported
NAMED = 8  # ranks that a line names
# Files, as parts of their paths, whose functions wait for other ranks.
WAITING = ("/torch/distributed/", "/deepspeed/comm/")
OURS = "/mmpeft_ds/"
# Our own threads, which say nothing about the work.
HIDDEN = ("stop-watch", "stall-watch", "stall-hub")
# The thread that saves beside the training, and the description of the process group that it talks over. Both count
# only while the main thread waits for it: a slow disk of rank 0 keeps those of all other ranks in a collective.
BESIDE = "checkpoint"
AWAITS_BESIDE = "/mmpeft_ds/engine/background.py"


@dataclass(frozen=True)
class Report:
    """A rank's report of its own state.

    Attributes:
        rank: its number.
        owner: its process.
        entered: collectives that it has begun, by process group.
        still: seconds since it began the last one.
        waits: whether one of its threads waits for other ranks.
        where: the line of code at which its main thread is, or the one beside it that it waits for.
        stack: the frames of that thread, outermost first; empty while nothing is amiss.
        stop: why it was asked to stop; empty if it was not.
        done: it ends, since its work is done.
    """

    rank: int
    owner: Owner
    entered: Mapping[str, int] = field(default_factory=dict)
    still: float = 0.0
    waits: bool = False
    where: str = ""
    stack: tuple[str, ...] = ()
    stop: str = ""
    done: bool = False


@dataclass(frozen=True)
class Awaited:
    """A rank that others wait for, as a line tells it; `owner` is None where it was never heard of."""

    rank: int
    owner: Owner | None
    silent: bool
    words: str


def awaited(heard: Mapping[int, tuple[float, Report]], world_size: int, now: float, patience: float) -> list[Awaited]:
    """The ranks that the others wait for; none if nobody waits, or if it cannot be told.

    Args:
        heard: rank -> when it last reported, and what.
        now: on the same clock.
        patience: seconds of silence that mean nothing yet.
    """
    silent = [r for r in range(world_size) if r not in heard or now - heard[r][0] > patience]
    if silent:
        return [_silent(rank, heard.get(rank), now) for rank in silent]
    reports = {rank: report for rank, (_, report) in heard.items()}
    most: dict[str, int] = {}
    for report in reports.values():
        for group, count in report.entered.items():
            most[group] = max(count, most.get(group, 0))
    behind = {rank for rank, r in reports.items() if any(count < most[group] for group, count in r.entered.items())}
    busy = {rank for rank, report in reports.items() if not report.waits}
    # Of those behind, the ones that wait themselves do so for another. With none behind, a rank that gives or takes
    # something outside of collectives may be awaited.
    chosen = (behind & busy) or behind or (busy if len(busy) < world_size else set())
    return [_alive(reports[rank]) for rank in sorted(chosen)]


def _silent(rank: int, last: tuple[float, Report] | None, now: float) -> Awaited:
    if last is None:
        return Awaited(rank, None, True, f"rank {rank}, which was never heard of")
    owner = last[1].owner
    seconds = now - last[0]
    words = f"rank {rank} on {owner.host} (pid {owner.pid}), not heard of since {clock(seconds)}"
    return Awaited(rank, owner, True, words)


def _alive(report: Report) -> Awaited:
    owner = report.owner
    return Awaited(
        report.rank,
        owner,
        False,
        f"rank {report.rank} on {owner.host} (pid {owner.pid}), which is alive, at {report.where} since "
        f"{clock(report.still)}",
    )


def words(ranks: Sequence[Awaited]) -> str:
    """The ranks in one line, the first ones by name."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return "; ".join(one.words for one in ranks[:NAMED]) + more


def clock(ago: float) -> str:
    """The time of day so many seconds ago."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() - ago))


def stacks(reports: list[Report]) -> list[str]:
    """Lines with the stack of each rank, ranks with the same one together."""
    same: dict[tuple[str, ...], list[int]] = {}
    for report in sorted(reports, key=lambda r: r.rank):
        same.setdefault(report.stack, []).append(report.rank)
    lines = []
    for stack, ranks in same.items():
        listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        lines += [f"stack of rank{'s' * (len(ranks) > 1)} {listed}, innermost last:", *(f"  {line}" for line in stack)]
    return lines


def awaits_beside() -> bool:
    """Whether the main thread waits for the thread that saves beside the training."""
    own = _walk(sys._current_frames().get(threading.main_thread().ident))
    return any(AWAITS_BESIDE in frame.f_code.co_filename for frame in own)


def position() -> dict[str, Any]:
    """`waits`, `where` and `stack` of this process for its report."""
    frames, names = sys._current_frames(), {t.ident: t.name for t in threading.enumerate()}
    walks = {ident: _walk(f) for ident, f in frames.items() if names.get(ident, "") not in HIDDEN}
    own = walks.get(threading.main_thread().ident, [])
    beside = {ident: walk for ident, walk in walks.items() if names.get(ident, "").startswith(BESIDE)}
    if any(AWAITS_BESIDE in frame.f_code.co_filename for frame in own):
        own = next(iter(beside.values()), own)
    else:
        walks = {ident: walk for ident, walk in walks.items() if ident not in beside}
    return {
        # A few frames up: torch waits below functions of its own.
        "waits": any(part in f.f_code.co_filename for walk in walks.values() for f in walk[:6] for part in WAITING),
        "where": _named(next((f for f in own if OURS in f.f_code.co_filename), own[0])) if own else "",
        "stack": tuple(_named(f) for f in reversed(own[:FRAMES])),
    }


def _walk(frame: FrameType | None) -> list[FrameType]:
    """Frames of a thread, innermost first."""
    walk = []
    while frame is not None:
        walk.append(frame)
        frame = frame.f_back
    return walk


def _named(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    short = file[file.rindex("site-packages/") + 14 :] if "site-packages/" in file else file
    short = short[short.rindex(OURS) + 1 :] if OURS in short else short
    return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
