#!/usr/bin/env bash
# DeepSpeed: WarmupLR, WarmupDecayLR and WarmupCosineLR climb with the logarithm, and begin with two steps of rate 0.
#
# A good guess: a warm-up over 100 steps is a straight line: a tenth of the rate after 10 steps, the half after 50.
# What happens: half of the full rate after 10 of 100 steps, 85 % after 50; and the first two optimiser steps are taken with
#   rate 0 (one before the schedule ran, one because the logarithm of 1 is 0). A line needs warmup_type: linear.
# Source: deepspeed.runtime.lr_schedules.WarmupLR._get_gamma and WARMUP_TYPE's default, WARMUP_LOG_RATE.
# Who is hurt: whoever carries a schedule over from transformers, where the same words mean a line: short warm-ups meant to
#   tame freshly initialised adapters are nearly over after a few steps.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

observe <<'PY'
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR

def rates(schedule, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = schedule(optimizer, warmup_num_steps=100, **options)
    taken = []
    for _ in range(101):
        optimizer.step()
        taken.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    return [round(taken[step], 2) for step in (0, 1, 10, 50, 100)]

for schedule, options in ((WarmupLR, {"warmup_max_lr": 1.0}), (WarmupDecayLR, {"warmup_max_lr": 1.0, "total_num_steps": 1000}),
                          (WarmupCosineLR, {"total_num_steps": 1000})):
    seen = rates(schedule, **options)
    print(f"{schedule.__name__}: share of the full rate at optimiser steps 0, 1, 10, 50, 100 of 100: {seen}")
    assert seen == [0.0, 0.0, 0.5, 0.85, 1.0], seen
line = rates(WarmupLR, warmup_max_lr=1.0, warmup_type="linear")
print("WarmupLR, warmup_type linear:", line)
assert line == [0.0, 0.0, 0.09, 0.49, 0.99] or line[3] < 0.51, line
PY
