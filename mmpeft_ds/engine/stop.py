"""Clean stop: after a signal, or when the launcher has died, every rank finishes its step, saves and exits.

Without this (measured), SIGTERM to `deepspeed` kills that process alone, and its child `launch.py` and
all ranks go on as orphans. SIGTERM to `launch.py` reaches the ranks one after the other and kills them 30 seconds
later. Ctrl-C reaches a rank twice, as SIGINT from the terminal and as SIGTERM from `launch.py`.

It is enough that one rank notices: `requested()` is all-reduced, so that all ranks stop after the same step.
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
AGAIN = 1.0  # seconds after which another Ctrl-C is a second one, and not the first one arriving twice
LAUNCHERS = ("deepspeed", "deepspeed.launcher", "torchrun", "torch.distributed.run", "torch.distributed.launch")


class StopFlag:
    """Notices requests to end the run. Use it as a context manager around the run, in the main thread.

    The first SIGTERM or SIGINT only sets the flag. A second Ctrl-C, at least a second after the first, ends the
    process at once, as Python's default handler does. SIGTERM may come any number of times: launchers repeat it.

    Args:
        grace: seconds after a request until the process is ended if it has not exited (`engine.stop_grace`). The
            `deepspeed` launcher kills its ranks 30 seconds after it gets a signal itself in any case.
        on_request: called once with the reason, from the watching thread.
    """

    def __init__(self, grace: float = 30.0, on_request: Callable[[str], None] | None = None):
        self.grace = grace
        self.reason = ""
        self._on_request = on_request
        self._since: float | None = None
        self._reported = False
        self._closed = threading.Event()
        self._previous: dict[int, Any] = {}
        self._launchers: list[psutil.Process] = []

    def requested(self) -> bool:
        """Whether this rank has noticed a request; cheap, no collective."""
        return self._since is not None

    def request(self, reason: str) -> None:
        """Request the end of the run."""
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
        # Python runs handlers between two bytecodes of the main thread, which may wait in a collective. The byte that
        # the C handler writes here wakes the watching thread at once.
        self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers; ends the time limit of a requested stop."""
        self._closed.set()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.requested() and self._launchers:
            # `launch.py` sends SIGTERM to one rank after the other; ranks that are exiting already when it arrives
            # shall still exit with 0.
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
            if not self._reported and self._on_request is not None:
                self._reported = True
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
    launchers = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            with contextlib.suppress(psutil.Error):
                if _is_launcher(process.cmdline()):
                    launchers.append(process)
    return launchers


def alive(process: psutil.Process) -> bool:
    """Whether the process runs: the same one, by pid and start time, and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it cannot be seen, which does not mean that it is dead


def _is_launcher(command: list[str]) -> bool:
    """Whether interpreter, options and program are those of a launcher; later words belong to the script."""
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
