"""Every rank tells rank 0 that it lives and how far it is; who waits long learns for whom, and in the end leaves.

This goes over connections of its own and in threads of its own, since the main thread of a rank that waits is inside
gloo or NCCL, and the ranks' store is served by a rank that may be the one which hangs. It costs a message of a few
hundred bytes per rank every few seconds, and nothing in a step: the number of collectives that a rank has begun is
what torch counts anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from mmpeft_ds import stop
from mmpeft_ds.distributed.stall import NAMED, Awaited, Report, awaited, clock, position, stacks, words
from mmpeft_ds.owner import Owner

KEY = "mmpeft_ds/stall_watch"
BEAT = 5.0  # seconds between two reports, fewer where `stall` is short
LIMIT = 1 << 16  # bytes of a message


class Watchdog:
    """The watching thread of a rank.

    Args:
        rank, world_size: of this process.
        stall: seconds without a new collective after which a rank that waits says so.
        timeout: seconds after which it leaves.
    """

    running: Watchdog | None = None

    def __init__(self, rank: int, world_size: int, stall: float, timeout: float):
        self.rank, self.world_size, self.stall, self.timeout = rank, world_size, stall, timeout
        self.beat = min(BEAT, stall / 6)
        self.owner = Owner.me()
        self.waits_for: list[Awaited] = []  # while this rank has waited for longer than `stall`
        self._entered: dict[str, int] = {}
        self._moved = self._answered = time.monotonic()
        self._next_line = stall
        self.hub = Hub(self) if rank == 0 else None
        self._channel = _Channel(self._meet(), self.beat)
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()
        if stop.Watch.running is not None:
            stop.Watch.running.stuck = self.words

    def words(self) -> str:
        """Whom this rank has been waiting for too long; empty if for nobody."""
        return words(self.waits_for)

    def _meet(self) -> tuple[str, int, str]:
        """Address and password of rank 0, which it leaves in the ranks' store."""
        store = dist.distributed_c10d._get_default_store()
        if self.hub is not None:
            store.set(KEY, json.dumps([self.hub.port, self.hub.password]))
        port, password = json.loads(store.get(KEY))
        return os.environ["MASTER_ADDR"], port, password

    def _watch(self) -> None:
        began = time.monotonic()
        while True:
            self._forgive(time.monotonic() - began)
            began = time.monotonic()
            report = self.report()
            if self.hub is not None:
                answer = self.hub.answer(report)
            else:
                answer = self._channel.ask(report)
            if answer is not None:
                self._answered = time.monotonic()
            with contextlib.suppress(Exception):  # whatever it is, the next round tries again
                self._judge(report, answer or self._alone(report))
            time.sleep(max(0.0, self.beat - (time.monotonic() - began)))

    def _forgive(self, gap: float) -> None:
        """After a pause of this process itself, such as of a whole job that was suspended, begin to count anew."""
        if gap > self.stall / 2:
            self._moved += gap
            self._answered += gap
            if self.hub is not None:
                self.hub.forgive(gap)

    def report(self) -> Report:
        """What this rank says of itself now."""
        entered = self._entered
        with contextlib.suppress(RuntimeError, AttributeError):  # the groups are gone at the end
            groups = list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []
            entered = {group.group_name: group._get_sequence_number_for_group() for group in groups}
        if entered != self._entered:
            self._entered, self._moved = entered, time.monotonic()
        still = time.monotonic() - self._moved
        watch = stop.Watch.running
        asked = watch.reason if watch is not None and watch.flag is not None else ""
        seen = position() if still > self.stall / 2 else {}
        return Report(self.rank, self.owner, entered, still, stop=asked, **seen)

    def _alone(self, report: Report) -> Answer:
        """What to think where rank 0 does not answer: that it is the one which is missing."""
        silence = time.monotonic() - self._answered
        if silence < self.stall / 2 or not report.waits:
            return Answer()
        owner = self._channel.owner
        place = f"{owner.host} (pid {owner.pid})" if owner else os.environ["MASTER_ADDR"]
        said = f"rank 0 on {place}, not heard of since {clock(silence)}"
        return Answer([Awaited(0, owner, True, said)], report.still > self.timeout)

    def _judge(self, report: Report, answer: Answer) -> None:
        if answer.stop and (watch := stop.Watch.running) is not None:
            watch.request(answer.stop)
        others = [one for one in answer.awaited if one.rank != self.rank]
        if answer.end and answer.awaited:
            self._leave(report, others)
        if report.still < self.stall or not others:
            if self.waits_for and report.still < self.stall:
                self._say("goes on")
                self.waits_for, self._next_line = [], self.stall
            return
        self.waits_for = others
        if report.still >= self._next_line:
            first, self._next_line = self._next_line == self.stall, 2 * report.still
            self._say(
                f"waiting since {clock(report.still)} ({report.still:.0f} s) at {report.where} for {self.words()}. "
                f"Ends after {self.timeout:g} s (engine.timeout)."
            )
            if self.hub is not None and first:
                print("\n".join(stacks(self.hub.living())), file=sys.stderr, flush=True)

    def _leave(self, report: Report, others: list[Awaited]) -> None:
        for one in others:
            # A stopped process of this machine would go on when it is woken, and holds its memory until then.
            if one.silent and one.owner is not None and one.owner.ended() is False:
                with contextlib.suppress(OSError):
                    os.kill(one.owner.pid, signal.SIGKILL)
        if self.hub is not None:
            self.hub.wait_until_told()
        waited = f"has waited {report.still:.0f} s for {words(others)}" if others else "is waited for by the others"
        stop.leave(
            1,
            f"rank {self.rank} on {self.owner.host}: leaving; it {waited}. The last complete checkpoint is whole; the "
            "same command continues from it.",
        )

    def _say(self, words: str) -> None:
        print(f"rank {self.rank} on {self.owner.host}: {words}", file=sys.stderr, flush=True)


@dataclass
class Answer:
    """What rank 0 answers to a report: for whom the ranks wait, whether all end, and why they are to stop."""

    awaited: list[Awaited] = field(default_factory=list)
    end: bool = False
    stop: str = ""
    owner: Owner | None = None  # rank 0


class Hub:
    """Rank 0's end of the connections, and what it has heard."""

    def __init__(self, dog: Watchdog):
        self.dog, self.password = dog, secrets.token_hex(16)
        self.heard: dict[int, tuple[float, Report]] = {}
        self.told: set[int] = set()  # ranks that know that all end
        self.ending = False
        self._lock = threading.Lock()
        local = os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost")
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() and not local else socket.AF_INET
        address = ("127.0.0.1" if local else "", 0)
        self.server = socket.create_server(
            address, family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
        )
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._serve, name="stall-hub", daemon=True).start()

    def living(self) -> list[Report]:
        """The last reports of the ranks that are heard of, but for those whose stack is not known."""
        with self._lock:
            now = time.monotonic()
            return [r for when, r in self.heard.values() if now - when < self.dog.stall / 2 and r.stack]

    def answer(self, report: Report) -> Answer:
        """Take in a report."""
        now = time.monotonic()
        with self._lock:
            self.heard[report.rank] = now, report
            patience = self.dog.stall / 2
            found = awaited(self.heard, self.dog.world_size, now, patience)
            missing = {one.rank for one in found}
            waiting = [r.still for when, r in self.heard.values() if now - when < patience and r.rank not in missing]
            if max(waiting, default=0.0) < self.dog.stall:
                found = []
            self.ending = bool(found) and max(waiting) > self.dog.timeout
            if self.ending:
                self.told.add(report.rank)
            stops = ((r.rank, r.stop) for _, r in self.heard.values() if r.stop)
            asked = next((why if why.startswith("rank ") else f"rank {rank}: {why}" for rank, why in stops), "")
        return Answer(found[: 2 * NAMED], self.ending, asked, self.dog.owner)

    def forgive(self, gap: float) -> None:
        """Take a pause of this process out of the silence of the others."""
        with self._lock:
            self.heard = {rank: (when + gap, report) for rank, (when, report) in self.heard.items()}

    def wait_until_told(self) -> None:
        """Return when all ranks that are heard of know that they end, or have had the time to learn it."""
        end = time.monotonic() + 3 * self.dog.beat
        while time.monotonic() < end and not {r.rank for r in self.living()} <= self.told:
            time.sleep(0.05)

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self.server, selectors.EVENT_READ)
        unread: dict[socket.socket, bytes] = {}
        while True:
            for key, _ in selector.select():
                if key.fileobj is self.server:
                    connection, _ = self.server.accept()
                    connection.setblocking(False)
                    unread[connection] = b""
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                try:
                    piece = connection.recv(LIMIT)
                    unread[connection] += piece
                    if not piece or len(unread[connection]) > LIMIT:
                        raise ConnectionError
                    if unread[connection].endswith(b"\n"):
                        connection.send(self._replied(unread[connection]))
                        unread[connection] = b""
                except (OSError, ValueError, TypeError, KeyError):  # gone, or none of ours
                    selector.unregister(connection)
                    connection.close()
                    del unread[connection]

    def _replied(self, line: bytes) -> bytes:
        password, given = json.loads(line)
        if not secrets.compare_digest(str(password), self.password):
            raise ValueError
        report = Report(**{**given, "owner": Owner(**given["owner"]), "stack": tuple(given["stack"])})
        return json.dumps(asdict(self.answer(report))).encode() + b"\n"


class _Channel:
    """Another rank's end: a question and an answer, over a connection that is made anew when it fails."""

    def __init__(self, meeting: tuple[str, int, str], patience: float):
        self.host, self.port, self.password = meeting
        self.patience = max(1.0, patience)
        self.owner: Owner | None = None  # rank 0, once it has answered
        self._connection: socket.socket | None = None

    def ask(self, report: Report) -> Answer | None:
        """Rank 0's answer; None if none came in time."""
        try:
            if self._connection is None:
                self._connection = socket.create_connection((self.host, self.port), timeout=self.patience)
            self._connection.settimeout(self.patience)
            self._connection.sendall(json.dumps([self.password, asdict(report)]).encode() + b"\n")
            line = b""
            while not line.endswith(b"\n"):
                if not (piece := self._connection.recv(LIMIT)):
                    raise ConnectionError
                line += piece
            return self._read(json.loads(line))
        except (OSError, ValueError, TypeError, KeyError):
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            return None

    def _read(self, given: dict[str, Any]) -> Answer:
        ranks = [Awaited(**(one | {"owner": one["owner"] and Owner(**one["owner"])})) for one in given["awaited"]]
        self.owner = Owner(**given["owner"])
        return Answer(ranks, given["end"], given["stop"], self.owner)


def start(rank: int, world_size: int, stall: float, timeout: float) -> None:
    """Watch this rank from now on, once; every rank calls it when all have met. Alone there is nobody to wait for."""
    if world_size > 1 and Watchdog.running is None:
        Watchdog.running = Watchdog(rank, world_size, stall, timeout)
