#!/usr/bin/env bash
# TensorBoard's Python reader: after an event file that it has read is deleted, it never shows another point of that folder.
#
# A good guess: deleting an old event file of a run removes its points at most; new files are still found.
# What happens: the reader stays with the file that is gone, at every reload its error is swallowed, and the files that come
#   later are not opened. Nothing is printed; the curves seem to have ended. A file cut short in its place does no harm.
# Source: tensorboard.backend.event_processing.directory_watcher.DirectoryWatcher.Load (OpError is dropped while the folder
#   exists) and _LoadInternal, which reads the present file before it looks for the next.
# Who is hurt: programs that clean up event files when a run is resumed, while TensorBoard (load_fast=false) is open.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 tensorboard==2.21.0

observe <<'PY'
import pathlib, time
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

def write(folder, steps):
    with SummaryWriter(folder) as writer:
        for step in steps:
            writer.add_scalar("loss", 0.0, step)

seen = {}
for removed in (False, True):
    folder = f"run_{removed}"
    write(folder, range(3))
    reader = EventAccumulator(folder)
    reader.Reload()
    if removed:
        next(pathlib.Path(folder).iterdir()).unlink()
    time.sleep(1.1)
    write(folder, range(3, 6))
    for _ in range(3):
        reader.Reload()
    seen[removed] = [point.step for point in reader.Scalars("loss")]
    print(f"steps 0 to 2 read, file {'deleted' if removed else 'kept'}, 3 to 5 written: after three reloads {seen[removed]}")
assert seen == {False: list(range(6)), True: list(range(3))}, seen
PY
