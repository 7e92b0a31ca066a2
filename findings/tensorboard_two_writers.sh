#!/usr/bin/env bash
# TensorBoard's Python reader: of two writers that are open in one folder, the older one's later points are never shown.
#
# A good guess: a folder is one run, and all its event files are read as they grow.
# What happens: files are read in the order of their names, that is of their starting times; once a newer one exists, the
#   older ones are not looked at again. While both are written, the first one's points stop; a reader started afterwards sees
#   them all, so that the curve is short only as long as somebody watches the run.
# Source: tensorboard.backend.event_processing.directory_watcher.DirectoryWatcher. (`tensorboard` uses it with
#   --load_fast=false and where its data server is not installed; EventAccumulator always.)
# Who is hurt: trainer and evaluator that log into one folder, and tools that follow a run through EventAccumulator.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 tensorboard==2.21.0

observe <<'PY'
import time
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

def steps(reader):
    reader.Reload()
    return {tag: [point.step for point in reader.Scalars(tag)] for tag in sorted(reader.Tags()["scalars"])}

train = SummaryWriter("run", filename_suffix=".train")
train.add_scalar("train", 0.0, 0)
train.flush()
time.sleep(1.1)
evaluation = SummaryWriter("run", filename_suffix=".eval")
evaluation.add_scalar("eval", 0.0, 0)
evaluation.flush()
watching = EventAccumulator("run")
steps(watching)
for step in (1, 2):
    for writer, tag in ((train, "train"), (evaluation, "eval")):
        writer.add_scalar(tag, float(step), step)
        writer.flush()
    live = steps(watching)
late = steps(EventAccumulator("run"))
print("both writers wrote steps 0, 1, 2; a reader that watched saw", live)
print("a reader started afterwards sees", late)
assert live == {"train": [0], "eval": [0, 1, 2]} and late == {"train": [0, 1, 2], "eval": [0, 1, 2]}
PY
