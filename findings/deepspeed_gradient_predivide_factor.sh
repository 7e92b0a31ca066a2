#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: gradient_predivide_factor equal to the rank count changes the size of every gradient.
#
# A good guess: the factor only moves a part of the division by the rank count before the reduction, against overflow; the
#   averaged gradient is the same for every factor, at every stage.
# What happens: at stages 0, 1 and 2 it is. At stage 3 (reduce_scatter off, which the option asks for there) the factor is
#   multiplied back only where it differs from the rank count: with 2 ranks and factor 2 gradients are half as large.
# Source: deepspeed.runtime.zero.stage3, __avg_scatter_contiguous_grads: buffers are divided by the factor and by the rank
#   count, and multiplied by the factor again only if the two differ.
# Who is hurt: runs moved from stage 2 to stage 3 with the same JSON: SGD and clipping change, Adam hides most of it.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import torch, deepspeed
from deepspeed.utils import safe_get_full_fp32_param

deepspeed.init_distributed("gloo", verbose=False)

def step_length(stage, factor):
    """How far one step of SGD with learning rate 1 moves the weights, that is the norm of the averaged gradient."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 6)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
                "gradient_predivide_factor": factor, "zero_optimization": {"stage": stage, "reduce_scatter": False}})
    weights = lambda: torch.cat([(safe_get_full_fp32_param(p) if stage else p.detach()).flatten().clone()
                                 for p in model.parameters()])
    before = weights()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(deepspeed.comm.get_rank()))
    engine.backward(engine(x).square().mean())
    engine.step()
    return (weights() - before).norm().item()

for stage in (0, 1, 2, 3):
    plain = step_length(stage, 1.0)
    ratios = {factor: round(step_length(stage, factor) / plain, 4) for factor in (2.0, 4.0)}
    print(f"stage {stage}, 2 ranks: gradient with factor F over gradient with factor 1: {ratios}")
    assert ratios == {2.0: 0.5 if stage == 3 else 1.0, 4.0: 1.0}, ratios
PY
