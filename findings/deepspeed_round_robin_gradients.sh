#!/usr/bin/env bash
# DeepSpeed, ZeRO 1 and 2: with round_robin_gradients, safe_get_full_fp32_param returns other parameters' numbers.
#
# A good guess: the option deals gradients to the ranks in another order to even out communication; whatever the order
#   inside, the functions of deepspeed.utils that read "the full fp32 weight of this parameter" still return it.
# What happens: training is right, but safe_get_full_fp32_param(p) and safe_get_full_optimizer_state(p, ...) return values
#   of other parameters, in the right shape and without a warning. Only the parameter itself (p.data) can be trusted.
# Source: deepspeed.runtime.zero.stage_1_and_2._link_all_hp_params: offsets into the reordered buffer are computed in the order
#   of the parameter group, unless some tensor happens to be padded.
# Who is hurt: whoever exports adapters, keeps moments in checkpoints of their own, or logs weight norms through these calls.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import torch, deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

deepspeed.init_distributed("gloo", verbose=False)

def train(stage, round_robin):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(5)])
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage, "round_robin_gradients": round_robin}})
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(deepspeed.comm.get_rank()))
    for _ in range(3):
        engine.backward(engine(x).square().mean())
        engine.step()
    named = list(engine.module.named_parameters())
    differ = [n for n, p in named if not torch.equal(p.detach(), safe_get_full_fp32_param(p))]
    moments = [safe_get_full_optimizer_state(p, "exp_avg") for _, p in named]
    return [p.detach().clone() for _, p in named], differ, moments

for stage in (1, 2):
    plain, differ, moments = train(stage, False)
    assert differ == [], differ
    dealt, differ_dealt, moments_dealt = train(stage, True)
    print(f"stage {stage}: weights that training leaves are equal with and without the option:",
          all(map(torch.equal, plain, dealt)))
    wrong = sum(not torch.equal(a, b) for a, b in zip(moments, moments_dealt))
    print(f"stage {stage}: of {len(plain)} parameters, safe_get_full_fp32_param differs from the parameter for "
          f"{len(differ_dealt)}, safe_get_full_optimizer_state(exp_avg) from its value without the option for {wrong}")
    assert all(map(torch.equal, plain, dealt)) and len(differ_dealt) >= 5 and wrong >= 5
PY
