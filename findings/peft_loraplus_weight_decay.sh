#!/usr/bin/env bash
# peft: create_loraplus_optimizer(..., weight_decay=0.1) builds an optimizer whose weight decay is 0.
#
# A good guess: keyword arguments other than LoRA+'s own go to the optimizer class, as the learning rate does, and hold for all groups.
# What happens: every group is given a weight_decay of its own, which is 0.0 unless loraplus_weight_decay is passed; a group's value goes
#   before the optimizer's. weight_decay is accepted, stands in optimizer.defaults, and has no effect. Biases stay at 0 in any case.
# Source: peft.optimizers.loraplus.create_loraplus_optimizer (loraplus_weight_decay is popped from the arguments, default 0.0).
# Who is hurt: a move from AdamW to LoRA+ with the same arguments trains without regularisation; a sweep over weight_decay compares
#   equal runs.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2

observe <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

def trained(**decay):
    """The largest weight of lora_A after 20 steps of a loss that is 0, so that nothing but decay moves it."""
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=1.0, **decay)
    weight = next(p for name, p in model.named_parameters() if "lora_A" in name)
    before = weight.abs().max().item()
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.ones(1, 8)).sum() * 0.0).backward()
        optimizer.step()
    return optimizer, weight.abs().max().item() / before

optimizer, kept = trained(weight_decay=0.5)
_, own = trained(loraplus_weight_decay=0.5)
print("weight_decay=0.5: in the defaults", optimizer.defaults["weight_decay"], "in the groups",
      [group["weight_decay"] for group in optimizer.param_groups], f"weights after 20 steps {kept:.3f} of the first")
print(f"loraplus_weight_decay=0.5: {own:.3f} of the first")
assert optimizer.defaults["weight_decay"] == 0.5 and {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
assert kept == 1.0 and own < 0.4
PY
