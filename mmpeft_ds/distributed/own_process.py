"""This process: the memory it holds and gives back, and when Python looks for garbage in it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
from collections.abc import Iterator

PAGE = os.sysconf("SC_PAGE_SIZE")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_TRIM_DEFAULT, _MMAP_DEFAULT = 128 * 1024, 65536
_MADV_DONTNEED = 4  # sys/mman.h
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)")  # how it begins in /proc/self/smaps


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


def keep_freed_memory() -> None:
    """Let glibc keep freed memory; otherwise the kernel maps and clears every large tensor again in every step."""
    _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Context of the build of a model on the CPU, whose memory goes back where steps do not need it.

    The build reads and converts tensors of which steps keep none, and its fingerprint reads all weights of mapped
    files, of which steps read those of the words that occur. Freed memory is kept from then on (`keep_freed_memory`).
    """
    _mallopt({_M_MMAP_MAX: _MMAP_DEFAULT, _M_TRIM_THRESHOLD: _TRIM_DEFAULT})
    try:
        yield
    finally:
        give_back_mapped(".safetensors")
        give_back_freed()
        keep_freed_memory()


def give_back_freed() -> None:
    """Give back what glibc has kept so far, before work that needs other memory than steps do."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(options: dict[int, int]) -> None:
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)


def give_back_mapped(suffix: str) -> int:
    """Take the pages of mapped files out of this process, such as weights that were read once and hardly after that.

    They stay in the system's cache of files, from where a page comes back when it is read. Mappings with a page that
    this process has changed, in memory or swapped out, are left as they are. Without /proc nothing happens.

    Args:
        suffix: of the names of the files, such as `.safetensors`.

    Returns:
        bytes of the mappings.
    """
    try:
        with open("/proc/self/smaps") as file:
            unchanged = _unchanged(file.read().splitlines(), suffix)
    except OSError:
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(end - begin for begin, end in unchanged if madvise(begin, end - begin, _MADV_DONTNEED) == 0)


def _unchanged(smaps: list[str], suffix: str) -> Iterator[tuple[int, int]]:
    """Begin and end of the mappings in /proc/self/smaps that hold nothing but what is in such a file."""
    begin, end, own = 0, 0, True
    for line in smaps:
        if mapping := _MAPPING.fullmatch(line):
            begin, end = (int(number, 16) for number in mapping.groups()[:2])
            own = not mapping[3].endswith(suffix)
        elif line.startswith("Anonymous:"):
            own = own or line.split()[1] != "0"
        elif line.startswith("Swap:") and not own and line.split()[1] == "0":  # comes after it
            yield begin, end
