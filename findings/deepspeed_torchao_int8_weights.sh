#!/usr/bin/env bash
# DeepSpeed with torchao: a model with int8 weights that trains in plain torch cannot be given to deepspeed.initialize.
#
# A good guess: below ZeRO 3 DeepSpeed keeps frozen weights as they are, so that adapters over an int8 base train as they do
#   in plain torch.
# What happens: initialize raises "Couldn't swap Linear.weight", also where the model is on its device already. A base in int8
#   alone is enough; nothing else of the configuration matters.
# Source: deepspeed.runtime.engine.DeepSpeedEngine._configure_distributed_model moves the module with `module.to`, and before
#   that holds weak references to its parameters, with which torch.utils.swap_tensors, used for subclasses of tensors, refuses.
# Who is hurt: adapters over a torchao base (transformers' TorchAoConfig too) with the Trainer or accelerate and any ZeRO stage.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8 torchao==0.18.0

in_ranks 1 <<'PY'
import torch, deepspeed
from torchao.quantization import Int8WeightOnlyConfig, quantize_

deepspeed.init_distributed("gloo", verbose=False)

def model(int8):
    base = torch.nn.Sequential(torch.nn.Linear(32, 32)).requires_grad_(False)
    if int8:
        quantize_(base, Int8WeightOnlyConfig())
    return torch.nn.ModuleDict({"base": base, "adapter": torch.nn.Linear(32, 32)})

class Sum(torch.nn.Module):
    def __init__(self, int8):
        super().__init__()
        self.parts = model(int8)

    def forward(self, x):
        return (self.parts["base"](x) + self.parts["adapter"](x)).square().mean()

def loss_after_a_step_of_torch():
    whole = Sum(True)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=0.01)
    x = torch.ones(2, 32)
    first = whole(x)
    first.backward()
    optimizer.step()
    return float(first), float(whole(x))

def given_to_deepspeed(int8, stage):
    whole = Sum(int8)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=0.01)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    try:
        deepspeed.initialize(model=whole, optimizer=optimizer, config=config)
    except RuntimeError as error:
        return str(error).splitlines()[0][:60]
    return "trains"

before, after = loss_after_a_step_of_torch()
print(f"plain torch, int8 base: loss {before:.3f}, after a step {after:.3f}")
seen = {(int8, stage): given_to_deepspeed(int8, stage) for int8 in (False, True) for stage in (0, 1, 2)}
for (int8, stage), what in seen.items():
    print(f"{'int8' if int8 else 'float'} base, stage {stage}: {what}")
assert after < before
assert all(("swap" in what) if int8 else what == "trains" for (int8, _), what in seen.items())
PY
