#!/usr/bin/env bash
# DeepSpeed: a configuration that does not mention clipping clips gradients at norm 1.
#
# A good guess: as in torch, nobody clips unless asked; leaving gradient_clipping out equals 0.
# What happens: left out equals 1.0, at every ZeRO stage. At stage 0 in float32, get_global_grad_norm() besides returns None.
# Source: deepspeed.runtime.constants.GRADIENT_CLIPPING_DEFAULT, read by deepspeed.runtime.config.get_gradient_clipping.
# Who is hurt: whoever compares a loop of their own, DDP or FSDP with DeepSpeed: another optimiser step, no word about it.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import torch, deepspeed
from deepspeed.utils import safe_get_full_fp32_param

deepspeed.init_distributed("gloo", verbose=False)

def step_length(stage, **clipping):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 6)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage}, **clipping})
    weights = lambda: torch.cat([(safe_get_full_fp32_param(p) if stage else p.detach()).flatten().clone()
                                 for p in model.parameters()])
    before = weights()
    engine.backward(100 * engine(torch.ones(4, 6)).square().mean())
    engine.step()
    return (weights() - before).norm().item(), engine.get_global_grad_norm()

for stage in (0, 1, 2, 3):
    unset, norm = step_length(stage)
    off, _ = step_length(stage, gradient_clipping=0.0)
    print(f"stage {stage}: step of SGD(lr=1) with the key left out {unset:.4f}, with gradient_clipping 0.0 {off:.4f}, "
          f"get_global_grad_norm() {norm if norm is None else round(float(norm), 4)}")
    assert abs(unset - 1) < 1e-3 and off > 10 and (norm is None) == (stage == 0)
PY
