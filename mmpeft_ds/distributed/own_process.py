"""This process: the memory it holds, and when Python looks for garbage in it."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterator

PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory:
    """Resident memory, read through one file that stays open: opening it takes longer than reading."""

    def __init__(self) -> None:
        self._pages = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115 - open as long as the process

    def resident(self) -> int:
        """Bytes of this process in memory now."""
        return int(os.pread(self._pages.fileno(), 100, 0).split()[1]) * PAGE

    @staticmethod
    def most() -> int:
        """Bytes of this process in memory at most so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def garbage_later() -> Iterator[None]:
    """Context in which Python does not look for objects that refer to each other.

    A forward pass makes so many objects of autograd that Python looks through them once or twice in each, at another
    moment on every rank; after the backward pass few are left.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
