#!/usr/bin/env bash
# TensorBoard: add_scalar rounds counters above 16.7 million, and double_precision=True does not help.
#
# A good guess: a scalar is a double as in Python; or at least the option of that name makes it one.
# What happens: values are stored as float32: 16,777,217 samples read back as 16,777,216, token counts in steps of thousands
#   later on. double_precision is used only together with new_style=True.
# Source: torch.utils.tensorboard.summary.scalar (simple_value is a 32-bit field).
# Who is hurt: samples, tokens and times kept as scalars: rates computed from their differences are 0 or jump.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 tensorboard==2.21.0

observe <<'PY'
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from tensorboard.util import tensor_util

count = 2_000_000_001
writer = SummaryWriter("run")
writer.add_scalar("plain", count, 0)
writer.add_scalar("double", count, 0, double_precision=True)
writer.add_scalar("new double", count, 0, new_style=True, double_precision=True)
writer.close()
reader = EventAccumulator("run")
reader.Reload()
seen = {tag: int(reader.Scalars(tag)[0].value) for tag in ("plain", "double")}
seen["new double"] = int(tensor_util.make_ndarray(reader.Tensors("new double")[0].tensor_proto))
print(f"{count} written; read back: {seen}")
assert seen == {"plain": 2_000_000_000, "double": 2_000_000_000, "new double": count}
PY
