"""TensorBoard's event file of a run: whole records at any moment, and written again where somebody removes it.

torch's SummaryWriter opens the file by its name for every record, in a thread: one that was removed would begin anew,
without its head and all points before, and without its folder the thread ends in a traceback.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from mmpeft_ds.engine.events import partial_name
from mmpeft_ds.files import append, is_removed, naming, replacing

_KINDS = {"scalar": summary.scalar, "image": functools.partial(summary.image, dataformats="CHW"), "text": summary.text}
_NUMBERS = itertools.count()  # of the files of this process


class Board:
    """One event file, which is new.

    Args:
        folder: of the event files; it is made.
        first: the first step that will be written; a TensorBoard that has been open since before drops what it has of
            that and later ones.

    Raises:
        CannotWrite: by every method, which then leaves the file as it was.
    """

    def __init__(self, folder: Path, first: int):
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self.path, self.pending = folder / f"events.out.tfevents.{name}", io.BytesIO()
        self._record(Event(file_version="brain.Event:2"))
        self._record(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self.head, self.pending = self.pending.getvalue(), io.BytesIO()
        self.file = self._opened(self.head)

    def add(self, kind: str, tag: str, value: Any, step: int) -> None:
        """Note a point, which `write` writes: `scalar`, `image` (3, H, W) in [0, 1], or `text`, which is Markdown."""
        self._record(Event(step=step, summary=_KINDS[kind](tag, value)))

    def write(self) -> None:
        """Write the points noted so far, all of them or none."""
        points, self.pending = self.pending.getvalue(), io.BytesIO()
        append(self.file, points)

    def restore(self) -> bool:
        """Write the file again if somebody has removed or replaced it; True if so."""
        content = self.head
        with contextlib.suppress(OSError):  # over NFS what another machine has removed cannot be read any more
            if not is_removed(self.file, self.path):
                return False
            self.file.seek(0)
            content = self.file.read()
        opened = self._opened(content)
        self.close()
        self.file = opened
        return True

    def close(self) -> None:
        """Close the file; what was not written is dropped."""
        with contextlib.suppress(OSError):  # failures to write have been reported where they occurred
            self.file.close()

    def _opened(self, content: bytes) -> BinaryIO:
        with naming(self.path):
            self.path.parent.mkdir(exist_ok=True)
            with replacing(self.path, partial_name(self.path)) as temporary:
                temporary.write_bytes(content)
            return self.path.open("a+b", buffering=0)

    def _record(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self.pending).write(event.SerializeToString())
