#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: a module whose forward reads another module's weight.dtype keeps that weight whole until it returns.
#
# A good guess: a question about the dtype or the device of a weight costs nothing; the weight is gathered for the layer that multiplies by it
#   and released behind it.
# What happens: reading `self.child.weight` in a parent's forward registers the weight as an external parameter of the parent. From the
#   second step on it is gathered before the parent begins and held until the parent's forward, and backward, has ended, while
#   all its other layers run; without the question it is released behind its own layer.
# Source: deepspeed.runtime.zero.parameter_offload.ZeROOrderedDict.__getitem__ (register_external_parameter).
# Who is hurt: adapters and heads that write x.to(self.down.weight.dtype), as many released ones do: the memory of ZeRO 3 is that of
#   whole weights, and a planner that counts one gather a layer is wrong.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import torch, deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

deepspeed.init_distributed("gloo", verbose=False)

class Parent(torch.nn.Module):
    def __init__(self, asks):
        super().__init__()
        self.asks, self.down, self.up = asks, torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)

    def forward(self, x):
        if self.asks:
            x = x.to(self.down.weight.dtype)
        return self.up(torch.relu(self.down(x))).square().sum()

held = {}
for asks in (False, True):
    model = Parent(asks)
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}}
    seen = []
    model.up.register_forward_pre_hook(lambda *_: seen.append(weight.ds_status == ZeroParamStatus.AVAILABLE))
    weight = model.down.weight
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    for _ in range(3):
        engine.backward(engine(torch.randn(4, 64)))
        engine.step()
    held[asks] = seen
    print(f"the parent asks for its child's weight.dtype: {asks}; weight whole while the next layer runs, in three steps: {held[asks]}")
assert held[False] == [False] * 3 and held[True][1:] == [True] * 2
PY
