"""A watch over calls that get hostile input: nothing is executed, nothing written outside, time and memory bounded."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

CPU_SECONDS = 60.0  # of one case, which takes milliseconds; processor time, so that other load does not count
STUCK = 900.0  # seconds in a call into C, which no signal ends
MEMORY = 1 << 30  # bytes that may be added to what the process has
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
    "socket.connect", "socket.bind", "ctypes.dlopen", "webbrowser.open", "shutil.unpack_archive",
)  # fmt: skip
CHANGES = {"os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.rename": (0, 1), "os.link": (1,)}
CHANGES |= {"os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "shutil.rmtree": (0,)}


class Hang(BaseException):
    """A case that used more than CPU_SECONDS; no `except Exception` takes it for a fault of a sample."""


class Guard:
    """What calls may do while `watch` is on.

    Args:
        folder: below which files may be written.
    """

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self.on = False
        self.violations: list[str] = []
        sys.addaudithook(self._audit)  # for ever; without effect while it is not on

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """For one case. Raises Hang, and AssertionError for what the case did and must not."""
        self.violations.clear()
        before = signal.signal(signal.SIGPROF, self._hang)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of modules that are imported on the way
        self.on = True
        try:
            yield
        finally:
            self.on = False
            sys.dont_write_bytecode = bytecode
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        assert not self.violations, self.violations

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """For many cases: the process gets no more than MEMORY on top, and a call that never returns ends it."""
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + MEMORY, hard))
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def _hang(self, *_: object) -> None:
        raise Hang(f"more than {CPU_SECONDS:.0f} s")

    def _audit(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.violations.append(f"{event} {args!r:.200}")
        elif event == "open":
            path, _, flags = args
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & WRITES:
                self._check(event, path)
        else:
            for place in CHANGES.get(event, ()):
                if isinstance(args[place], (str, bytes)):
                    self._check(event, args[place])

    def _check(self, event: str, path: str | bytes) -> None:
        path = os.path.realpath(os.fsdecode(path))
        if path != os.devnull and not path.startswith(self.folder + os.sep):
            self.violations.append(f"{event} {path}")
