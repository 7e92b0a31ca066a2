#!/usr/bin/env bash
# DeepSpeed: after safe_set_full_fp32_param the model still computes with the old weights.
#
# A good guess: the call sets the parameter, in its float32 master and in what forward uses; at stage 3 it cuts the tensor
#   into the ranks' parts for any size.
# What happens: only the master changes. The next forward uses the old weight; the new one arrives with the next
#   engine.step(). At stage 3 a tensor whose size is no multiple of the rank count is refused with a RuntimeError, on the
#   last rank alone, while the others go on (and wait for it in their next collective call).
# Source: deepspeed.utils.tensor_fragment.safe_set_full_fp32_param and, for stage 3,
#   deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.set_full_hp_param.
# Who is hurt: whoever loads adapters or checkpoints of their own into a running engine: the first loss and every
#   evaluation before the first step are those of the initial weights.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import torch, deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

deepspeed.init_distributed("gloo", verbose=False)
rank = deepspeed.comm.get_rank()

def engine_of(stage):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 7)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-9), config={
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}})
    return engine, model

x = torch.ones(1, 6)
for stage in (1, 2, 3):
    engine, model = engine_of(stage)
    before = engine(x).detach().clone()
    safe_set_full_fp32_param(model.weight, torch.full((7, 6), 5.0))  # 42 numbers, 21 a rank
    master = safe_get_full_fp32_param(model.weight)
    after = engine(x)
    moved = (after - before).abs().max().item()
    engine.backward(after.sum() * 0.0)
    engine.step()
    stepped = (engine(x) - before).abs().max().item()
    print(f"stage {stage}: master set to {master.unique().tolist()}, output moved by {moved}, after one more step by {stepped:.1f}")
    assert master.unique().tolist() == [5.0] and moved == 0.0 and stepped > 10

try:
    safe_set_full_fp32_param(model.bias, torch.full((7,), 5.0))  # 7 numbers over 2 ranks
    refused = False
except RuntimeError as error:
    refused = True
    print(f"rank {rank}: {error}")
verdicts = [None, None]
torch.distributed.all_gather_object(verdicts, refused)
print("stage 3, 7 numbers over 2 ranks: refused on ranks", [r for r, verdict in enumerate(verdicts) if verdict])
assert verdicts == [False, True], verdicts
PY
