"""Truncation of TensorBoard's event files after a step.

The record at the head of a new file (`board.Board`) only asks TensorBoard to forget points that it has loaded; other
readers of the files keep them. Here the points themselves are removed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft_ds.files import replacing

PARTIAL = "partial"  # in the name of a file that is being written anew, in place of tfevents
# Beginnings of the monitor's tags of an evaluation, which have the name of a split; pictures are of evaluations too.
EVALUATION = re.compile(r"eval/|(cut_texts|control_tokens)/.+/")


def truncate(folder: Path, step: int, evaluated: bool = True) -> None:
    """Remove from the event files below `folder` every summary above `step`, and everything from a record on that
    is cut short, as by a kill, or damaged.

    Files without either are left untouched. A file that keeps no summary stays with its head alone: a TensorBoard that
    reads it at the moment would stop at a file that is gone, and never come to the later ones
    (findings/tensorboard_reader_stops_at_removed_file.sh).

    Args:
        step: that the run continues from; 0 is the start, where everything is written again.
        evaluated: the evaluation after `step` is kept; otherwise it is made again, and its points go as well.
    """
    for path in sorted(folder.rglob("*.tfevents.*")) if folder.is_dir() else ():
        if path.is_file():
            _truncate_file(path, step, evaluated)


def partial_name(path: Path) -> Path:
    """Where an event file is written before it takes its name: TensorBoard reads whatever has `tfevents` in it."""
    return path.with_name(f".{path.name.replace('tfevents', PARTIAL)}")


def _records(path: Path) -> Iterator[tuple[bytes, Any]]:
    """Records and the events in them, up to the first that is not whole."""
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    # The loader ends silently at a record that is cut or has wrong sums, but believes any length whose sum is right.
    with contextlib.suppress(DecodeError, MemoryError, OverflowError):
        for record in RawEventFileLoader(str(path)).Load():
            yield record, Event.FromString(record)


def _of_evaluation(event: Any) -> bool:
    return any(EVALUATION.match(value.tag) or value.HasField("image") for value in event.summary.value)


def _truncate_file(path: Path, step: int, evaluated: bool) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept, summaries = [], 0
    for record, event in _records(path):
        is_summary = event.HasField("summary")
        again = step == 0 or (not evaluated and _of_evaluation(event))
        if is_summary and (event.step > step or (event.step == step and again)):
            continue
        summaries += is_summary
        kept.append(record)
    if not summaries:
        kept = kept[:1]
    if sum(len(record) + 16 for record in kept) == path.stat().st_size:  # 16 bytes of frame around each
        return
    with replacing(path, partial_name(path)) as temporary, temporary.open("wb") as file:
        writer = RecordWriter(file)
        for record in kept:
            writer.write(record)
