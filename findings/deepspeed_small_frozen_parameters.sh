#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: frozen parameters below the persistence threshold are gathered anew after every optimiser step.
#
# A good guess: small parameters that are kept whole on every rank cost communication only when they change; frozen ones
#   never change, so after the first gather they cost nothing.
# What happens: engine.step() gathers all persistent parameters, the frozen ones too. With a base made of matrices below the
#   threshold (default 100,000 numbers), each step sends the whole base, for 130 trained numbers.
# Source: deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._post_step, persistent_parameters[0].all_gather(...).
# Who is hurt: adapters on a frozen base over a slow network, and whoever raises stage3_param_persistence_threshold to save
#   gathers: it moves them behind the step, where nothing hides them.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import torch, deepspeed
import deepspeed.comm.comm as comm

deepspeed.init_distributed("gloo", verbose=False)
gathered = 0
gather = comm.cdb.all_gather_into_tensor

def counted(output_tensor, *args, **kwargs):
    global gathered
    gathered += output_tensor.numel()
    return gather(output_tensor, *args, **kwargs)

comm.cdb.all_gather_into_tensor = counted

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(10)])
        self.adapter = torch.nn.Linear(64, 2)

    def forward(self, x):
        return self.adapter(self.base(x))

config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=config):
    model = Model()
model.base.requires_grad_(False)
trained = list(model.adapter.parameters())
engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained), config=config)
for step in range(3):
    gathered, counts = 0, []
    loss = engine(torch.ones(4, 64)).square().mean()
    for call in (lambda: engine.backward(loss), engine.step, lambda: None):
        counts.append(gathered)
        gathered = 0
        call()
    print(f"step {step}: numbers gathered in forward {counts[0]}, in backward {counts[1]}, after the step {counts[2]}")
total = sum(p.ds_numel for p in model.parameters())
print(f"the model has {total} numbers, {sum(p.ds_numel for p in trained)} are trained")
assert counts == [0, 0, total], counts
PY
