"""The lock under which one process compiles an extension of torch, such as DeepSpeed's operators, and others wait.

torch waits without a word for a file that no killed process removes. Ours bears its owner's name, is taken from an
owner that has ended, and is not asked for where the library is finished. It is the same file, so that processes which
do not know of this one keep out of its way.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import sys
import threading
import time
from pathlib import Path

from mmpeft_ds.files import is_on_local_disk
from mmpeft_ds.owner import Owner
from mmpeft_ds.registration import when_imported

SILENT = 5.0  # seconds of waiting before the first line, then a minute between two
TOUCH = 10.0  # seconds between the owner's signs of life, for machines that cannot see its process
LIFELESS = 60.0  # seconds without one
NAMELESS = 600.0  # age in seconds from which the lock of another machine's torch is taken for forgotten


def install() -> None:
    """Let torch take these locks."""

    def replace() -> None:
        sys.modules["torch.utils.cpp_extension"].FileBaton = BuildLock

    when_imported("torch.utils.cpp_extension", replace, at_once=True)


class BuildLock:
    """Takes the place of `torch.utils.file_baton.FileBaton`: the lock of the folder of one extension."""

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None):
        self.path, self.wait_seconds = Path(lock_file_path), wait_seconds
        self._descriptor = -1
        self._released = threading.Event()
        self._seen: tuple[float, float] = (0.0, 0.0)  # last sign of life of another machine, and when it was new here

    def try_acquire(self) -> bool:
        """Wait until this process may compile, True, or the library is finished, False."""
        began, next_line = time.monotonic(), SILENT
        while not is_finished(self.path.parent):
            if self._created():
                if not is_finished(self.path.parent):
                    return True
                self.release()  # whoever had the lock has finished since the last look
                return False
            self._take_from_the_dead()
            waited = time.monotonic() - began
            if waited > next_line:
                next_line = waited + 60
                _say(f"waiting for {self.path}, held by {self._holder() or 'nobody that can be seen'}, which compiles")
            time.sleep(self.wait_seconds)
        return False

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def release(self) -> None:
        """Remove the file."""
        self._released.set()
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)

    def _created(self) -> bool:
        try:
            self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        os.write(self._descriptor, Owner.me().line().encode())
        threading.Thread(target=self._touch, daemon=True).start()
        if not library(self.path.parent).exists():
            _say(f"compiling {self.path.parent.name} in {self.path.parent}, once; this takes about a minute")
        return True

    def _touch(self) -> None:
        while not self._released.wait(TOUCH):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def _holder(self) -> str:
        """Name of the lock's holder; empty if unknown."""
        with contextlib.suppress(OSError):
            if owner := Owner.read(self.path.read_text(errors="replace")):
                return str(owner)
            if pid := _opened_by(self.path):
                return f"pid {pid} of this machine"
        return ""

    def _take_from_the_dead(self) -> None:
        """Remove the file if whoever made it has ended."""
        with contextlib.suppress(OSError):  # released meanwhile, or not ours to remove
            descriptor = os.open(self.path, os.O_RDWR)
            try:
                # Of several that wait one removes it, and none removes the next owner's.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = os.fstat(descriptor)
                owner = Owner.read(os.pread(descriptor, 4096, 0).decode(errors="replace"))
                if os.stat(self.path).st_ino == there.st_ino and self._is_dead(owner, there.st_mtime):
                    self.path.unlink()
                    _say(f"note: removed {self.path}; {owner or 'the process that made it'} has ended")
            finally:
                os.close(descriptor)

    def _is_dead(self, owner: Owner | None, touched: float) -> bool:
        if owner is None:  # torch's own, which whoever compiles keeps open
            alone = is_on_local_disk(self.path)
            return not _opened_by(self.path) and (alone or time.time() - touched > NAMELESS)
        if (ended := owner.ended()) is not None:
            return ended
        if touched != self._seen[0]:
            self._seen = touched, time.monotonic()
        return time.monotonic() - self._seen[1] > LIFELESS


def library(folder: Path) -> Path:
    """The compiled library in the folder of an extension."""
    return folder / f"{folder.name}.so"


def is_finished(folder: Path) -> bool:
    """Whether the library in a folder was linked to its end, and after its sources and torch came here."""
    import torch.version

    try:
        finished = library(folder).stat().st_mtime_ns
        # ninja writes into its log when a command has ended: not yet while a library is half written.
        if (folder / ".ninja_log").stat().st_mtime_ns < finished:
            return False
        sources = re.findall(r"^build \S+\.o: \w+ (\S+)$", (folder / "build.ninja").read_text(), re.MULTILINE)
        newest = max(os.stat(source).st_mtime_ns for source in [*sources, torch.version.__file__])
    except (OSError, UnicodeDecodeError):
        return False
    return bool(sources) and newest <= finished


def _opened_by(path: Path) -> int:
    """A process of this machine, which we may look at, that has the file open; 0 if there is none."""
    wanted = path.stat()
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            there, pid = os.stat(link), int(link.split("/")[2])
            if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino) and pid != os.getpid():
                return pid
    return 0


def _say(line: str) -> None:
    print(f"rank {os.environ.get('RANK', '0')}: {line}", file=sys.stderr, flush=True)
