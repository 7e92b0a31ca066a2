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
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.distributed as dist

from mmpeft_ds import stop
from mmpeft_ds.distributed.stall import (
    BESIDE,
    NAMED,
    Awaited,
    Report,
    awaited,
    awaits_beside,
    clock,
    position,
    stacks,
    words,
)
from mmpeft_ds.owner import Owner

KEY = "mmpeft_ds/stall_watch"
BEAT = 5.0  # seconds between two reports, fewer where `stall` is short
LIMIT = 1 << 16  # bytes of a message
NOTICE = 2.0  # seconds after a lost connection within which it is known whose process has ended


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
        self._lost: list[Awaited] = []  # reported last by rank 0
        self._moved = self._answered = time.monotonic()
        self._next_line = stall
        self.hub = Hub(self) if rank == 0 else None
        self._channel = _Channel(self._meet(), self.beat)
        # Before anything else happens: nobody could say of a rank that dies unheard that its process has ended.
        self._ask(self.report()) or self._ask(self.report())
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()
        if (watch := stop.Watch.running) is not None:
            watch.stuck, watch.lost, watch.farewell = self.words, self.lost, self.farewell
            watch.abandon = lambda: end_stopped(self.waits_for)

    def words(self) -> str:
        """Whom this rank has been waiting for too long; empty if for nobody."""
        return words(self.waits_for)

    def lost(self) -> str:
        """Whose process has ended without a farewell, for a rank that has lost a connection; empty if nobody's."""
        end = time.monotonic() + NOTICE
        while True:
            answer = self._ask(self.report())
            ended = answer.lost if answer is not None else []
            if answer is None and self._channel.refused:
                # Rank 0 may have left before this rank did, because of the lost rank that it has reported.
                ended = self._lost or self._rank_0("whose process has ended")
            if ended or time.monotonic() > end:
                break
            time.sleep(0.1)
        if self.hub is not None and ended:
            # One that waits for rank 0 alone asks once a beat, and would else name rank 0 as the lost one.
            self.hub.wait_until_told(self.beat + NOTICE, {one.rank for one in ended})
        return words(ended)

    def farewell(self) -> None:
        """Tell rank 0 that this rank ends since its work is done."""
        if self.hub is None:
            self._ask(replace(self.report(), done=True))

    def _ask(self, report: Report) -> Answer | None:
        return self.hub.answer(report) if self.hub is not None else self._channel.ask(report)

    def _rank_0(self, words: str) -> list[Awaited]:
        owner = self._channel.owner
        place = f"{owner.host} (pid {owner.pid})" if owner else os.environ["MASTER_ADDR"]
        return [Awaited(0, owner, True, f"rank 0 on {place}, {words}")]

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
            answer = self._ask(report)
            if answer is not None:
                self._answered, self._lost = time.monotonic(), answer.lost
            with contextlib.suppress(Exception):  # whatever it is, the next round tries again
                self._judge(report, answer or self._alone(report))
            time.sleep(max(0.0, self.beat - (time.monotonic() - began)))

    def _forgive(self, gap: float) -> None:
        """After a pause of this process itself, such as of a whole job that was suspended, start counting again."""
        if gap > self.stall / 2:
            self._moved += gap
            self._answered += gap
            if self.hub is not None:
                self.hub.forgive(gap)

    def report(self) -> Report:
        """The current report of this rank."""
        entered = self._entered
        with contextlib.suppress(RuntimeError, AttributeError):  # the groups are gone at the end
            groups = list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []
            if any(group.group_desc == BESIDE for group in groups) and not awaits_beside():
                groups = [group for group in groups if group.group_desc != BESIDE]
            entered = {group.group_name: group._get_sequence_number_for_group() for group in groups}
        if entered != self._entered:
            self._entered, self._moved = entered, time.monotonic()
        still = time.monotonic() - self._moved
        watch = stop.Watch.running
        asked = watch.reason if watch is not None and watch.flag is not None else ""
        seen = position() if still > self.stall / 2 else {}
        return Report(self.rank, self.owner, entered, still, stop=asked, **seen)

    def _alone(self, report: Report) -> Answer:
        """The conclusion when rank 0 does not answer: that it is the missing one.

        Not only where this rank waits in torch.distributed: on a GPU it waits for its device.
        """
        silence = time.monotonic() - self._answered
        if self._channel.refused and silence > 2 * self.beat:
            return Answer(lost=self._lost or self._rank_0("whose process has ended"))
        if silence < self.stall / 2:
            return Answer()
        silent = self._rank_0(f"not heard of since {clock(silence)}, and with it what it knows of others")
        return Answer(silent, report.still > self.timeout)

    def _judge(self, report: Report, answer: Answer) -> None:
        if answer.stop and (watch := stop.Watch.running) is not None:
            watch.request(answer.stop)
        # Gloo says at once that a rank is gone, to whoever waits in it; NCCL may never do so.
        if answer.lost and report.still > 2 * self.beat and (report.still > self.stall or position()["waits"]):
            self._leave(report, answer.lost)
        others = [one for one in answer.awaited if one.rank != self.rank]
        if answer.end and answer.awaited:
            self._leave(report, others)
        if report.still < self.stall or not others:
            if self.waits_for and report.still < self.stall:
                self._say("continues")
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
        end_stopped(others)
        if self.hub is not None:
            # One that is alive and stuck outside of torch can still learn why it ends.
            self.hub.wait_until_told(3 * self.beat, {one.rank for one in others if one.silent})
        waited = f"has waited {report.still:.0f} s for {words(others)}" if others else "is waited for by the others"
        stop.leave(
            1,
            f"rank {self.rank} on {self.owner.host}: leaving; it {waited}. The last complete checkpoint is whole; the "
            "same command continues from it.",
        )

    def _say(self, words: str) -> None:
        print(f"rank {self.rank} on {self.owner.host}: {words}", file=sys.stderr, flush=True)


def end_stopped(others: list[Awaited]) -> None:
    """SIGKILL to the stopped processes of this machine among those that are waited for: each would continue when it is
    woken, holds its memory until then, and launch.py waits half a minute for it to obey SIGTERM."""
    for one in others:
        if one.silent and one.owner is not None and one.owner.ended() is False:
            with contextlib.suppress(OSError):
                os.kill(one.owner.pid, signal.SIGKILL)


@dataclass
class Answer:
    """Answer of rank 0 to a report.

    Attributes:
        awaited: for whom the ranks wait.
        end: whether all end.
        stop: why they are to stop.
        owner: rank 0.
        lost: whose processes have ended without a farewell, the first one first.
    """

    awaited: list[Awaited] = field(default_factory=list)
    end: bool = False
    stop: str = ""
    owner: Owner | None = None
    lost: list[Awaited] = field(default_factory=list)


class Hub:
    """Rank 0's end of the connections, and what it has heard."""

    def __init__(self, dog: Watchdog):
        self.dog, self.password = dog, secrets.token_hex(16)
        self.heard: dict[int, tuple[float, Report]] = {}
        self.told: set[int] = set()  # ranks that know that all end, or which rank is lost
        self.ending = False
        self._connections: dict[int, socket.socket] = {}  # by rank
        self._lost: dict[int, Awaited] = {}
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
            late = awaited(self.heard, self.dog.world_size, now, patience)
            missing = {one.rank for one in late}
            waiting = [r.still for when, r in self.heard.values() if now - when < patience and r.rank not in missing]
            if max(waiting, default=0.0) < self.dog.stall:
                late = []
            self.ending = bool(late) and max(waiting) > self.dog.timeout
            lost = list(self._lost.values())
            if self.ending or lost:
                self.told.add(report.rank)
            stops = ((r.rank, r.stop) for _, r in self.heard.values() if r.stop)
            asked = next((why if why.startswith("rank ") else f"rank {rank}: {why}" for rank, why in stops), "")
        return Answer(late[: 2 * NAMED], self.ending, asked, self.dog.owner, lost[:NAMED])

    def forgive(self, gap: float) -> None:
        """Take a pause of this process out of the silence of the others."""
        with self._lock:
            self.heard = {rank: (when + gap, report) for rank, (when, report) in self.heard.items()}

    def wait_until_told(self, seconds: float, missing: set[int]) -> None:
        """Return when all ranks but the missing ones know that they end, or have had the time to learn it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._lock:
                if self.heard.keys() <= self.told | missing | self._lost.keys() | {self.dog.rank}:
                    return
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
                        connection.send(self._replied(unread[connection], connection))
                        unread[connection] = b""
                except (OSError, ValueError, TypeError, KeyError):  # gone, or none of ours
                    selector.unregister(connection)
                    connection.close()
                    del unread[connection]
                    self._closed(connection)

    def _closed(self, connection: socket.socket) -> None:
        """The kernel closes what a process has opened when it ends; a living one comes back before it is asked of."""
        with self._lock:
            for rank in [rank for rank, own in self._connections.items() if own is connection]:
                del self._connections[rank]
                report = self.heard.get(rank, (0.0, None))[1]
                if report is not None and report.done:
                    del self.heard[rank]
                elif report is not None:
                    place = f"{report.owner.host} (pid {report.owner.pid})"
                    said = f"rank {rank} on {place}, whose process has ended"
                    self._lost[rank] = Awaited(rank, report.owner, True, said)

    def _replied(self, line: bytes, connection: socket.socket) -> bytes:
        password, given = json.loads(line)
        if not secrets.compare_digest(str(password), self.password):
            raise ValueError
        report = Report(**{**given, "owner": Owner(**given["owner"]), "stack": tuple(given["stack"])})
        with self._lock:
            self._connections[report.rank] = connection
            self._lost.pop(report.rank, None)
        return json.dumps(asdict(self.answer(report))).encode() + b"\n"


class _Channel:
    """Another rank's end: a question and an answer, over a connection that is made again when it fails."""

    def __init__(self, meeting: tuple[str, int, str], patience: float):
        self.host, self.port, self.password = meeting
        self.patience = max(1.0, patience)
        self.owner: Owner | None = None  # rank 0, once it has answered
        self.refused = False  # its machine says that nobody listens there any more
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()

    def ask(self, report: Report) -> Answer | None:
        """Rank 0's answer; None if none came in time."""
        with self._lock:
            return self._asked(report)

    def _asked(self, report: Report) -> Answer | None:
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
            self.refused = False
            return self._read(json.loads(line))
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.refused = isinstance(error, ConnectionRefusedError)
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            return None

    def _read(self, given: dict[str, Any]) -> Answer:
        def ranks(name: str) -> list[Awaited]:
            return [Awaited(**(one | {"owner": one["owner"] and Owner(**one["owner"])})) for one in given[name]]

        self.owner = Owner(**given["owner"])
        return Answer(ranks("awaited"), given["end"], given["stop"], self.owner, ranks("lost"))


def start(rank: int, world_size: int, stall: float, timeout: float) -> None:
    """Watch this rank from now on, once; every rank calls it when all have met. Alone there is nobody to wait for."""
    if world_size > 1 and Watchdog.running is None:
        Watchdog.running = Watchdog(rank, world_size, stall, timeout)
