"""Temporary folders and named semaphores of multiprocessing, under names that tell whose they are.

Nobody removes those of a process that was killed together with all its children. The next start does, by these names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from multiprocessing import process, util
from pathlib import Path

from mmpeft_ds import owner

SEMAPHORES = Path("/dev/shm")  # where Linux shows them, as sem.NAME
PREFIX = "mmpeft-mp"
NAME = re.compile(rf"(?:sem\.)?{PREFIX}-([0-9a-f]+)-(\d+)-(\d+)(?:-.*)?")


def _here() -> str:
    return f"{zlib.crc32(owner.space().encode()):08x}"


def own_name() -> str:
    """Prefix of the names of this process's files."""
    return f"{PREFIX}-{_here()}-{os.getpid()}-{owner.started(os.getpid()) or 0}"


def take_name() -> None:
    """From now on multiprocessing calls what this process makes by its name."""
    config = process.current_process()._config
    config["semprefix"] = f"/{own_name()}"
    if config.get("tempdir") is None:
        folder = Path(tempfile.gettempdir()) / own_name()
        folder.mkdir(mode=0o700, exist_ok=True)
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
        config["tempdir"] = str(folder)


def remove_own() -> None:
    """Remove what this process has made, as it ends."""
    for path in _all():
        if path.name.removeprefix("sem.").startswith(own_name()):
            _remove(path)


def remove_of_the_dead() -> list[Path]:
    """Remove what processes of this user have left that do not run any more; what it was.

    Those of other boots and containers are left alone: whether their processes run cannot be seen from here.
    """
    removed = []
    for path in _all():
        space, pid, started = NAME.fullmatch(path.name).groups()
        with contextlib.suppress(OSError):
            mine = path.stat().st_uid == os.geteuid()
            if mine and space == _here() and owner.started(int(pid)) != int(started):
                _remove(path)
                removed.append(path)
    return removed


def _all() -> Iterator[Path]:
    for folder in (SEMAPHORES, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            yield from (Path(entry) for entry in os.scandir(folder) if NAME.fullmatch(entry.name))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
