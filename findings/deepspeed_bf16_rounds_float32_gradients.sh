#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: where bf16 is on, gradients of float32 parameters are added up over ranks and kept in bfloat16.
#
# A good guess: parameters that were made float32 beside a bfloat16 base (adapters) have float32 gradients, which ranks add
#   up in float32, as ZeRO 1 does without bf16; at most "communication_data_type": "fp32" is needed for that.
# What happens: the gradient that the optimizer gets holds numbers of 8 bits. With communication_data_type fp32 the sum is
#   exact, but it is rounded afterwards, when it is kept. Only "data_types": {"grad_accum_dtype": "fp32"} beside it keeps it.
# Source: deepspeed.runtime.engine.communication_data_type and get_data_types (the model's dtype where nothing is said);
#   deepspeed.runtime.zero.stage3, __avg_scatter_grads: the partitions are cast to gradient_accumulation_dtype.
# Who is hurt: whoever trains float32 adapters over a bfloat16 base at stage 3; the rounding grows with the number of ranks.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import torch, deepspeed
from deepspeed.utils import safe_get_full_grad

deepspeed.init_distributed("gloo", verbose=False)
rank = deepspeed.comm.get_rank()

class Adapted(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapter = torch.nn.Parameter(torch.zeros(64, 64))  # float32, made outside zero.Init

    def forward(self, x):
        return (self.base(x.bfloat16()).float() * 0 + x @ self.adapter).sum()

def gradient(**more):
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, **more}
    with deepspeed.zero.Init(config_dict_or_path=config):
        base = torch.nn.Linear(64, 64)
    model = Adapted(base)
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=torch.optim.AdamW([model.adapter], lr=0.1))
    assert model.adapter.dtype == torch.float32
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank))
    engine.backward(engine(x))
    return safe_get_full_grad(model.adapter).float().clone()

rows = [torch.randn(8, 64, generator=torch.Generator().manual_seed(r)).sum(0) for r in range(2)]
exact = (sum(rows) / 2)[:, None].expand(64, 64)
eight_bits = lambda g: torch.equal(g, g.bfloat16().float())
for name, more in (("nothing said", {}),
                   ("communication_data_type fp32", {"communication_data_type": "fp32"}),
                   ("and grad_accum_dtype fp32", {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}})):
    found = gradient(**more)
    error = ((found - exact).abs().max() / exact.abs().max()).item()
    if rank == 0:
        print(f"{name}: all numbers fit bfloat16: {eight_bits(found)}, largest relative error {error:.1e}")
    assert eight_bits(found) == (name != "and grad_accum_dtype fp32")
    assert (error > 1e-4) == (name != "and grad_accum_dtype fp32")
PY
