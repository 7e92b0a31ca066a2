#!/usr/bin/env bash
# DeepSpeed: the flops profiler counts a backward pass of twice the forward pass, however much of the model is frozen.
#
# A good guess: with most parameters frozen the "bwd FLOPS" and "FLOPS per GPU" it prints are those of the work that is done.
# What happens: backward is taken for 2 x forward. Below the lowest trained parameter nothing is computed, and above it a frozen layer
#   computes one product in the place of two. A tower of which the last of four layers is trained computes a quarter of the forward pass
#   in backward: the rate of the backward pass is printed eight times too high, that of the step 2.4 times (before rounding).
# Source: deepspeed.profiling.flops_profiler.profiler.FlopsProfiler.print_model_profile (get_total_flops * 2, * 3).
# Who is hurt: utilisation (MFU) of adapter tuning read from this report: runs look two to three times as efficient as they are.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import re
import torch, deepspeed
from torch.utils.flop_counter import FlopCounterMode

deepspeed.init_distributed("gloo", verbose=False)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
model[:3].requires_grad_(False)
batch = torch.randn(8, 64)
with FlopCounterMode(display=False) as forward:
    loss = model(batch).sum()
with FlopCounterMode(display=False) as backward:
    loss.backward()
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=[p for p in model.parameters() if p.requires_grad],
    config={"train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
            "flops_profiler": {"enabled": True, "profile_step": 1, "detailed": False, "output_file": "report.txt"}})
for _ in range(3):
    engine.backward(engine(batch).sum())
    engine.step()

report = open("report.txt").read()
scale = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}

def value(pattern):
    """A number of the report in plain units (seconds, operations, operations a second)."""
    number, unit = re.search(pattern + r"[^\n]*?:\s+([\d.]+) (\w*)", report).groups()
    return float(number) * ({"ms": 1e-3, "us": 1e-6, "s": 1}[unit] if unit in ("ms", "us", "s") else scale[unit.replace("FLOPS", "")])

counted = value("fwd flops per GPU")
implied = value("bwd FLOPS per GPU") * value("bwd latency")
print(f"forward: {forward.get_total_flops()} operations, {counted:.0f} in the report with its biases")
print(f"backward: {backward.get_total_flops()} operations, {implied:.0f} behind the rate in the report")
assert abs(implied / counted - 2) < 0.05
assert backward.get_total_flops() * 4 == forward.get_total_flops() and implied > 7 * backward.get_total_flops()
PY
