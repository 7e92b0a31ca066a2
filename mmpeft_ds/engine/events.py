"""Truncation of TensorBoard's event files after a step.

`SummaryWriter(purge_step=...)` only asks TensorBoard to forget points that it has loaded; other readers of the files
keep them. Here the points themselves are removed.
"""

from __future__ import annotations

from pathlib import Path

from mmpeft_ds.files import replacing


def truncate(folder: Path, step: int) -> None:
    """Remove from the event files below `folder` every summary above `step`, and records that a kill has cut short.

    Files without either are left untouched; a file that keeps no summary is removed.
    """
    for path in sorted(folder.rglob("*.tfevents.*")) if folder.is_dir() else ():
        _truncate_file(path, step)


def _truncate_file(path: Path, step: int) -> None:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept, summaries = [], 0
    for record in RawEventFileLoader(str(path)).Load():  # ends silently at a record that is not whole
        event = Event.FromString(record)
        is_summary = event.HasField("summary")
        if is_summary and event.step > step:
            continue
        summaries += is_summary
        kept.append(record)
    if sum(len(record) + 16 for record in kept) == path.stat().st_size:  # 16 bytes of frame around each
        return
    if not summaries:
        path.unlink()
        return
    # TensorBoard reads every file that has `tfevents` in its name.
    temporary = path.with_name(f".{path.name.replace('tfevents', 'partial')}")
    with replacing(path, temporary), temporary.open("wb") as file:
        writer = RecordWriter(file)
        for record in kept:
            writer.write(record)
