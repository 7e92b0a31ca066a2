#!/usr/bin/env bash
# DeepSpeed: WarmupLR, WarmupDecayLR, OneCycle and LRRangeTest give every parameter group the same learning rate; WarmupCosineLR keeps them apart.
#
# A good guess: a schedule scales the rate of each group of the optimizer, as torch's and WarmupCosineLR do.
# What happens: the first four write one rate, computed from their own parameters, into all groups. The rates that the optimizer was
#   made with are gone after the first step, and nothing is said.
# Source: deepspeed.runtime.lr_schedules: WarmupLR._format_param repeats a number for all groups and get_lr never looks at the optimizer's rates;
#   WarmupCosineLR multiplies org_lrs.
# Who is hurt: LoRA+ (B matrices at 16 times the rate), heads and projectors with a rate of their own: a change of the scheduler's name in
#   the JSON changes which groups train at which rate.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import torch, deepspeed

deepspeed.init_distributed("gloo", verbose=False)
schedules = {
    "WarmupLR": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2},
    "WarmupDecayLR": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "total_num_steps": 100},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 10},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3},
    "WarmupCosineLR": {"warmup_num_steps": 2, "total_num_steps": 100},
}
ratios = {}
for name, parameters in schedules.items():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    groups = [{"params": list(model[0].parameters()), "lr": 1e-3}, {"params": list(model[1].parameters()), "lr": 1.6e-2}]
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config={
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, "scheduler": {"type": name, "params": parameters}})
    for _ in range(5):
        engine.backward(engine(torch.randn(2, 4)).sum())
        engine.step()
    low, high = (group["lr"] for group in optimizer.param_groups)
    ratios[name] = round(high / low, 3)
    print(f"{name}: groups made with rates 1e-3 and 1.6e-2 have {low:.6f} and {high:.6f} after 5 steps")
assert ratios == {"WarmupLR": 1, "WarmupDecayLR": 1, "OneCycle": 1, "LRRangeTest": 1, "WarmupCosineLR": 16}
PY
