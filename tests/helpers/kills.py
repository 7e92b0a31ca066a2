"""kill -9 at a moment drawn from a seed, of runs whose ranks are forked (`launch.run_forked`)."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers import launch, rank_server

MOMENTS = ("starting", "stepping", "saving")
EXACT = ("step", "epoch", "loss", "lr", "grad_norm", "sample_keys_hash", "weight")
VICTIMS = ("rank 0", "rank 1", "all ranks", "worker")


@dataclass
class Kill:
    """One kill; `at` runs in a thread beside the run.

    Attributes:
        moment: of `MOMENTS`: some seconds after the start; some steps later; while a checkpoint is being written. Or
            `loading`: when the last rank has a loader worker.
        victim: of `VICTIMS`; a loader worker where the run has one, else rank 1.
        wait: seconds, steps, or milliseconds until then, as the moment wants.
        done: whether it came before the run had ended.
        torn: whether it left a checkpoint that was being written.
    """

    moment: str
    victim: str
    wait: float
    done: bool = False
    torn: bool = False

    @classmethod
    def drawn(cls, draw: random.Random) -> Kill:
        moment = draw.choice(MOMENTS)
        longest = {"starting": 4.0, "stepping": 6.0, "saving": 4.0}[moment]
        victim = draw.choice(("rank 0", "all ranks") if moment == "saving" else VICTIMS)
        return cls(moment, victim, draw.uniform(0.0, longest))

    def at(self, run: Path, ended: threading.Event) -> None:
        """Wait for the moment and kill; whoever is left 10 s later is killed as well, as a launcher would do."""
        before = partial(run)
        if not self._reached(run, ended):
            return
        ranks = rank_server.ranks()
        victims = self._victims(ranks)
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                self.done = True
        if not ended.wait(10):
            for rank in rank_server.ranks():  # some may have been forked since
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
        self.torn = bool(partial(run) - before)

    def _reached(self, run: Path, ended: threading.Event) -> bool:
        if self.moment == "starting":
            return not ended.wait(self.wait)
        before, metrics = _lines(run), run / "metrics.jsonl"
        old = partial(run)
        while not ended.is_set():
            if self.moment == "loading" and self.workers():
                return True
            if self.moment == "saving" and partial(run) - old:
                time.sleep(self.wait / 1000)
                return True
            if self.moment == "stepping" and metrics.exists() and _lines(run) >= before + 1 + int(self.wait):
                time.sleep(self.wait % 1 / 10)
                return True
            time.sleep(0.0005)
        return False

    @staticmethod
    def workers() -> list[psutil.Process]:
        """Loader workers of the last rank, which take over from it some time after its first step."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            servers = [c for c in rank_server.ranks()[-1].children() if "forkserver" in " ".join(c.cmdline())]
            return [worker for server in servers for worker in server.children()]
        return []

    def _victims(self, ranks: list[psutil.Process]) -> list[psutil.Process]:
        if self.victim == "worker" and (workers := self.workers()):
            return workers[:1]
        return {"rank 0": ranks[:1], "all ranks": ranks}.get(self.victim, ranks[-1:])


def partial(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when their writer died: name and time of the last change."""
    with contextlib.suppress(FileNotFoundError):
        hidden = [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
        return {(p.name, p.stat().st_mtime_ns) for p in hidden}
    return set()


def _lines(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def run(kill: Kill | None, run_dir: Path, script: str | Path, *args: str, ranks: int = 2) -> launch.Result:
    """`launch.run_forked` of a script, with a kill beside it."""
    ended = threading.Event()
    killer = threading.Thread(target=kill.at, args=(run_dir, ended)) if kill else None
    if killer:
        killer.start()
    try:
        return launch.run_forked(script, *args, ranks=ranks, timeout=400.0)
    finally:
        ended.set()
        if killer:
            killer.join()


def curve(run: Path) -> list[tuple]:
    """What must be equal bit for bit in every line of metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in EXACT) for row in rows]


def check_same(run: Path, untouched: Path, steps: int) -> None:
    """Assert that a run has the curve and the adapter of another one, and that nothing half-written is left."""
    assert curve(run) == curve(untouched) and len(curve(run)) == steps
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (untouched / "adapter" / name).read_bytes()
    assert not partial(run), "what a killed run was writing is removed"
