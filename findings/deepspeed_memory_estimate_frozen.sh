#!/usr/bin/env bash
# DeepSpeed: its memory estimators count gradients and Adam states for frozen parameters.
#
# A good guess: estimate_zero3_model_states_mem_needs_all_live(model) looks at the live model, so at requires_grad.
# What happens: a model that is frozen whole gets the same estimate as one that is trained whole: 16 to 18 bytes a
#   parameter divided by the ranks, where a frozen one in 16 bits needs 2.
# Source: deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_live and its twin in stage_1_and_2:
#   the sum of p.numel() over all parameters, times a constant.
# Who is hurt: parameter-efficient tuning: "does not fit" for models that fit several times over, offloading for nothing.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

observe <<'PY'
import contextlib, io, torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs_all_live as estimate_3
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs_all_live as estimate_2

def table(estimate, model):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        estimate(model, num_gpus_per_node=8, num_nodes=1)
    return text.getvalue()

model = torch.nn.Sequential(*[torch.nn.Linear(2000, 2000) for _ in range(8)])
trained = [table(estimate, model) for estimate in (estimate_2, estimate_3)]
model.requires_grad_(False)
frozen = [table(estimate, model) for estimate in (estimate_2, estimate_3)]
print(frozen[1].strip())
print("estimates of the trained and of the frozen model are equal:", trained == frozen)
assert trained == frozen and "GPU" in frozen[1]
PY
