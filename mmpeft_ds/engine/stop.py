"""Stop cleanly: after a signal, or when the launcher has died, every rank finishes its step, saves and leaves.

What happens without this (measured): SIGTERM to `deepspeed` kills that process alone, and its child `launch.py` and
all ranks go on as orphans; SIGTERM to `launch.py` reaches the ranks one after the other and kills them 30 seconds
later; Ctrl-C reaches a rank twice, as SIGINT from the terminal and as SIGTERM from `launch.py`.

One rank that has noticed is enough: the engine all-reduces `requested()`, so that all stop after the same step.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL = 0.5  # seconds between looks at the launcher
AGAIN = 1.0  # a Ctrl-C this long after the first is a second one, not its echo
LAUNCHERS = ("deepspeed", "deepspeed.launcher", "torchrun", "torch.distributed.run", "torch.distributed.launch")


class StopFlag:
    """Notices that the run should end; use it as a context manager around training, in the main thread.

    The first SIGTERM or SIGINT only sets the flag. A second Ctrl-C, at least a second after the first, ends the
    process at once, as Python's default handler does. SIGTERM may come any number of times: launchers repeat it.

    Args:
        grace: seconds from the request to the end of the process if it has not left by itself (`engine.stop_grace`);
            the `deepspeed` launcher, when it gets the signal itself, kills ranks after 30 in any case.
        on_request: called once, from the watching thread, with the reason; for one line on the console.
    """

    def __init__(self, grace: float = 30.0, on_request: Callable[[str], None] | None = None):
        self.grace = grace
        self.reason = ""
        self._on_request = on_request
        self._since: float | None = None
        self._told = False
        self._closed = threading.Event()
        self._previous: dict[int, Any] = {}
        self._launchers: list[psutil.Process] = []

    def requested(self) -> bool:
        """Whether this rank has noticed a reason to stop; cheap, no collective."""
        return self._since is not None

    def request(self, reason: str) -> None:
        """Ask for the end of the run from within, for the given reason."""
        if self._since is None:
            self.reason = reason
            self._since = time.monotonic()

    def __enter__(self) -> StopFlag:
        self._launchers = launchers_above()
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        # Python runs handlers between two bytecodes of the main thread, which may hang in a collective; the byte that
        # the C handler writes here is seen by the watching thread at once.
        self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers that were there before; the time limit of a running stop ends with this."""
        self._closed.set()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.requested() and self._launchers:
            # `launch.py` sends its SIGTERM to one rank after the other: the last ones are leaving when it arrives, and
            # are to leave with 0.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._thread.join(2 * POLL)
        self._read.close()
        self._write.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._since is not None and time.monotonic() - self._since >= AGAIN:
            signal.default_int_handler(number, frame)
        self.request(signal.Signals(number).name)

    def _watch(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError, ValueError):
                select.select([self._read], [], [], POLL)
                for number in self._read.recv(64):
                    if number in SIGNALS:
                        self.request(signal.Signals(number).name)
            dead = next((p for p in self._launchers if not alive(p)), None)
            if dead is not None:
                self.request(f"the launcher (pid {dead.pid}) is gone")
            if self._since is None:
                continue
            if not self._told and self._on_request is not None:
                self._told = True
                self._on_request(self.reason)
            if time.monotonic() - self._since > self.grace and not self._closed.is_set():
                rank = os.environ.get("RANK", "0")
                print(
                    f"rank {rank}: stop requested ({self.reason}) but not done within {self.grace:g} s; leaving now. "
                    "The last complete checkpoint is whole. A longer engine.stop_grace gives more time.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def launchers_above() -> list[psutil.Process]:
    """Launcher processes among the ancestors of this one, nearest first; none for a plain `python train.py`."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            with contextlib.suppress(psutil.Error):
                if _is_launcher(process.cmdline()):
                    found.append(process)
    return found


def alive(process: psutil.Process) -> bool:
    """Whether the process runs: the same one, by pid and start time, and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # cannot be seen, which is no proof of its death


def _is_launcher(command: list[str]) -> bool:
    """Interpreter, options and program; what follows belongs to the script and may name anything."""
    for i, word in enumerate(command[:6]):
        name = os.path.basename(word)
        if word == "-m" and i + 1 < len(command):
            return any(command[i + 1] == known or command[i + 1].startswith(f"{known}.") for known in LAUNCHERS)
        if name in ("deepspeed", "ds", "torchrun") or word.endswith(
            ("deepspeed/launcher/launch.py", "torch/distributed/run.py")
        ):
            return True
        if i and not word.startswith("-"):
            return False
    return False
