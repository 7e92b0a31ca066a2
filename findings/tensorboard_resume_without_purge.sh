#!/usr/bin/env bash
# TensorBoard's Python reader: steps written again after a resume stand beside the old ones, unless purge_step was given.
#
# A good guess: a point replaces an earlier one of the same tag and step; what a crashed run wrote past its last checkpoint
#   disappears when the resumed run writes those steps again.
# What happens: both stay, in file order, so that the curve runs back and forth, and "the value at step 8" is the old one.
#   SummaryWriter(folder, purge_step=k) marks the start of the new part; then the reader drops what is older from step k on.
# Source: tensorboard.backend.event_processing.event_accumulator._MaybePurgeOrphanedData: only for a session start event.
# Who is hurt: resumed runs; best values read back from event files.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 tensorboard==2.21.0

observe <<'PY'
import time
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

seen = {}
for purge in (None, 6):
    for steps, value, options in ((range(10), 0.0, {}), (range(6, 12), 1.0, {"purge_step": purge})):
        writer = SummaryWriter(f"run_{purge}", **options)
        for step in steps:
            writer.add_scalar("loss", value, step)
        writer.close()
        time.sleep(1.1)
    reader = EventAccumulator(f"run_{purge}")
    reader.Reload()
    seen[purge] = [point.step for point in reader.Scalars("loss")]
    print(f"steps 0 to 9, then resumed and written from 6 to 11, purge_step {purge}: points at steps {seen[purge]}")
assert seen == {None: [*range(10), *range(6, 12)], 6: list(range(12))}, seen
PY
