"""TensorBoard's files of a run that goes on although somebody removes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.tensorboard import SummaryWriter

from mmpeft_ds.files import naming, write_atomic

_HEAD = 48  # bytes of a file's first record that no other file begins with: its length, its time, its kind


class Board:
    """A SummaryWriter whose file is written again when it is removed.

    TensorBoard's writer opens the file by its name for every record: one that was removed would begin anew, without
    its head and all points before; if its folder is gone, the writer ends for good.

    Args:
        folder: of the event files; it is made.
        first: the first step that will be written; a TensorBoard that has been open since before drops it and all
            later ones.
    """

    def __init__(self, folder: Path, first: int):
        self.folder = folder
        self.kept: dict[Path, BinaryIO] = {}  # files of this start, by which a removed one can still be read
        self._open(first)

    def add(self, kind: str, *values: Any) -> None:
        """Call `add_KIND` of the SummaryWriter. Raises OSError where its file cannot be written."""
        self._attempt(lambda: getattr(self.writer, f"add_{kind}")(*values))

    def flush(self) -> None:
        """Write all points so far."""
        self._attempt(lambda: self.writer.flush())

    def restore(self) -> bool:
        """Write files of this start again if somebody has removed them; True if so."""
        gone = [path for path, kept in self.kept.items() if not _leads_to(path, kept)]
        if gone:
            self._write_again(gone)
        return bool(gone)

    def close(self) -> None:
        """Write all points, and close the files."""
        for file in (self.writer, *self.kept.values()):
            with contextlib.suppress(OSError):  # failures to write have been reported where they occurred
                file.close()

    def _open(self, first: int | None) -> None:
        with naming(self.folder):
            before = set(self._files())
            self.writer = SummaryWriter(str(self.folder), flush_secs=30, purge_step=first)
            self.path = next(path for path in self._files() if path not in before)
            self.kept[self.path] = self.path.open("rb")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.tfevents.*"))

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except FileNotFoundError:  # the folder was removed since the last look
            self.restore()
            with naming(self.path):
                write()

    def _write_again(self, gone: list[Path]) -> None:
        with contextlib.suppress(OSError):
            self.writer.close()
        for path in gone:
            old = new = b""
            with contextlib.suppress(OSError), self.kept.pop(path) as kept:  # not over NFS by another machine
                kept.seek(0)
                old = kept.read()
            with contextlib.suppress(OSError):
                new = path.read_bytes()
            with naming(path):
                if not new or new[:_HEAD] != old[:_HEAD]:  # else somebody has put a copy there
                    self.folder.mkdir(exist_ok=True)
                    write_atomic(path, old + new)
                self.kept[path] = path.open("rb")
        self._open(None)


def _leads_to(path: Path, file: BinaryIO) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False
