#!/usr/bin/env bash
# TensorBoard: EventAccumulator gives 10,000 points of a curve and 4 pictures of a tag, chosen at random.
#
# A good guess: reading an event file in Python gives what was written; thinning is for the web page.
# What happens: beyond 10,000 scalars a random choice is kept (the last always is, the first need not be), of images 4, with
#   no word. size_guidance={"scalars": 0, "images": 0} gives all.
# Source: tensorboard.backend.event_processing.event_accumulator.DEFAULT_SIZE_GUIDANCE and reservoir.Reservoir.
# Who is hurt: plots and tables for papers, minima and "first step below x" computed from event files of long runs.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 tensorboard==2.21.0

observe <<'PY'
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

writer = SummaryWriter("run")
for step in range(20_000):
    writer.add_scalar("loss", float(step), step)
for step in range(12):
    writer.add_image("picture", np.zeros((3, 2, 2)), step)
writer.close()
seen = {}
for name, options in (("default", {}), ("size_guidance 0", {"size_guidance": {"scalars": 0, "images": 0}})):
    reader = EventAccumulator("run", **options)
    reader.Reload()
    points = reader.Scalars("loss")
    seen[name] = (len(points), len(reader.Images("picture")))
    print(f"{name}: {seen[name][0]} of 20000 points (first step {points[0].step}), {seen[name][1]} of 12 pictures")
assert seen == {"default": (10_000, 4), "size_guidance 0": (20_000, 12)}
PY
