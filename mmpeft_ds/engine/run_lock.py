"""Whether a run may take a directory: its lock, and what else refuses it. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import tempfile
import time
from pathlib import Path

from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import naming, writing

LOCK_WAIT = 5.0  # seconds; the ranks of a killed run need a moment to exit
logger = logging.getLogger(__name__)


class Lock:
    """A lock on a file, which ends with its process in any case; the file says which process holds it.

    POSIX record locks: unlike flock they are not inherited by loader workers that outlive a killed rank, and they work
    on NFS. They belong to the process, so the file must not be opened a second time by its owner.

    Raises:
        BadInput: if another process still holds it after `wait` seconds.
    """

    def __init__(self, path: Path, wait: float = LOCK_WAIT):
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(self.descriptor, path, wait)
        except BadInput:
            os.close(self.descriptor)
            raise
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {started}\n".encode(), 0)

    def keep(self) -> None:
        """See that the directory still belongs to this process; take the lock again if somebody has removed its file.

        Raises:
            BadInput: another process has the lock now.
            CannotWrite: the directory is gone.
        """
        own = there = None
        try:
            own = os.fstat(self.descriptor)
            there = os.stat(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            # So NFS answers for an open file that another machine has removed. A file system that does not answer well
            # at the moment is looked at again by the next call.
            if own is not None or error.errno != errno.ESTALE:
                return
        if own is not None and there is not None and os.path.samestat(there, own):
            return
        with naming(self.path):
            again = Lock(self.path, wait=0.0)
            os.close(self.descriptor)
            self.descriptor = again.descriptor
            # If it was the same file after all, closing it has released what was just taken.
            _take(self.descriptor, self.path, wait=0.0)

    def release(self) -> None:
        """Release the lock; the file stays, empty."""
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)


def refuse_taken(path: Path, wait: float = LOCK_WAIT) -> None:
    """Refuse a directory that a start would refuse before it reads anything there; changes nothing.

    Not for a process that holds the lock of `path`, which would lose it.

    Raises:
        BadInput: it holds something else, cannot be written, or another process still owns it after `wait` seconds.
    """
    refuse_foreign(path)
    refuse_unwritable(path)
    if (lock := path / ".lock").exists():
        with writing(lock):
            descriptor = os.open(lock, os.O_RDWR)
        try:
            _take(descriptor, lock, wait)
        finally:
            os.close(descriptor)  # which releases it


def first_free(path: Path) -> Path:
    """The first of PATH, PATH-1, PATH-2, ... that does not exist."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def refuse_foreign(path: Path) -> None:
    """Refuse a file, an adapter directory, and a directory with files that are not a run's. Raises BadInput."""
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: is a file, run_dir must name a directory")
    if (path / "adapter_config.json").exists():  # which holds a recipe.yaml too
        raise BadInput(f"{path}: is an adapter directory, which a run would overwrite. Choose another run_dir.")
    if path.is_dir() and any(path.iterdir()) and not any((path / n).exists() for n in ("recipe.yaml", ".lock")):
        raise BadInput(f"{path}: holds files that are not a run's. Choose another run_dir, or empty it.")


def refuse_unwritable(path: Path) -> None:
    """Refuse a directory that cannot be made or written, by an attempt: permissions say nothing of /proc. Raises
    BadInput."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    why = "is a file"
    if there.is_dir():
        try:
            with tempfile.TemporaryFile(dir=there):
                return
        except OSError as e:
            why = f"cannot be written ({os.strerror(e.errno or errno.EIO)})"
    raise BadInput(f"run_dir {path}: {there} {why}. Choose another run_dir, or mend its permissions.")


def _take(descriptor: int, path: Path, wait: float) -> None:
    """Lock the open file `path`. Raises BadInput if another process still holds it after `wait` seconds."""
    end = time.monotonic() + wait
    while not _try(descriptor, path):
        if time.monotonic() > end:
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
            raise BadInput(
                f"{path.parent}: another run is writing here ({owner or 'owner unknown'}). "
                "Wait for it, stop it, or add --fresh to start in a new directory."
            )
        time.sleep(0.1)


def _try(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s: this file system has no locks (%s); two runs here would not notice", path, e)
    return True
