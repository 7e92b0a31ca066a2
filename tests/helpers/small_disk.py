"""A file system of 4 MiB in memory, and less room on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[Path]:
    """The new directory `place` on it; the test is skipped where nothing can be mounted."""
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path, leave: int) -> Path:
    """A file that takes all room but `leave` bytes."""
    free = shutil.disk_usage(place).free
    ballast = place / "ballast"
    with ballast.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, ballast.stat().st_size + max(0, free - leave))
    return ballast
