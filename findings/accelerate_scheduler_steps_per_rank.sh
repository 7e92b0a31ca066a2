#!/usr/bin/env bash
# accelerate: one scheduler.step() on N ranks moves the schedule by N steps.
#
# A good guess: a prepared scheduler is stepped once for each optimiser step, as without accelerate; a schedule over T
#   optimiser steps ends after T.
# What happens: each call steps the schedule as many times as there are ranks (unless split_batches is set): a decay computed
#   from the length of the prepared loader, which is already divided by the ranks, ends after 1/N of the run, and warm-up too.
# Source: accelerate.scheduler.AcceleratedScheduler.step.
# Who is hurt: loops that compute the number of steps per rank, as one must for every other launcher; one rank shows nothing.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 webdataset==1.0.2 accelerate==1.15.0

in_ranks 2 <<'PY'
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 10))
model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
rates = []
for _ in range(6):
    rates.append(round(optimizer.param_groups[0]["lr"], 2))
    optimizer.step()
    schedule.step()
if accelerator.is_main_process:
    print("2 ranks, linear decay over 10 steps, learning rates of the first 6 optimiser steps:", rates)
assert rates == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], rates
torch.distributed.destroy_process_group()
PY
