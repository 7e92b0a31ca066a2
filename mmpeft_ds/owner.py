"""The process that owns a lock or a temporary file, and a check whether it still runs."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process, told from a later one of the same number.

    Attributes:
        host: name of its machine.
        space: boot of that machine and the namespace in which `pid` is counted, which containers have of their own.
        pid: its number there.
        started: clock ticks from the boot to its start.
        since: when it took what it owns, in words.
    """

    host: str
    space: str
    pid: int
    started: int
    since: str = ""

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), space(), os.getpid(), started(os.getpid()) or 0, now)

    @classmethod
    def read(cls, text: str) -> Owner | None:
        """The owner that `line` wrote; None for any other text."""
        try:
            owner = cls(**json.loads(text))
            return owner if isinstance(owner.pid, int) and isinstance(owner.started, int) else None
        except (ValueError, TypeError):
            return None

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    def ended(self) -> bool | None:
        """Whether the process has ended; None if that cannot be seen from here."""
        if self.space != space():
            return None
        return started(self.pid) != self.started

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"


def started(pid: int) -> int | None:
    """Clock ticks from the boot to the start of a process of this machine; None without one, or for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@cache
def space() -> str:
    """The boot of this machine, and the namespace in which process numbers are counted here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return socket.gethostname()
