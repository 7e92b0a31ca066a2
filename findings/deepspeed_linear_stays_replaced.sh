#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: after one zero.Init every linear layer of the process, of any model, computes by another function.
#
# A good guess: `with deepspeed.zero.Init():` changes what is built inside it; a model that is built, or was built before, without
#   it computes as ever once the block has ended.
# What happens: torch.nn.functional.linear is replaced for the rest of the process. A bfloat16 model without DeepSpeed then gives
#   other numbers for inputs of three dimensions: the bias is added to a product that was rounded already.
# Source: deepspeed.runtime.zero.partition_parameters: _enable_mem_efficient_linear sets torch.nn.functional.linear, and nothing
#   resets it; "memory_efficient_linear": false in zero_optimization leaves it alone. deepspeed.runtime.zero.linear is the function.
# Who is hurt: a teacher or reference model beside a ZeRO 3 model in one process, and tests that compare two runs in one process.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import torch, deepspeed

deepspeed.init_distributed("gloo", verbose=False)
torch.manual_seed(0)
layer, x = torch.nn.Linear(64, 64).bfloat16(), torch.randn(2, 8, 64).bfloat16()


def seen():
    with torch.no_grad():
        return layer(x), torch.nn.functional.linear


def build(**zero):
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1, "zero_optimization": {"stage": 3, **zero}}):
        torch.nn.Linear(4, 4)


before = seen()
build(memory_efficient_linear=False)
without = seen()
build()
after = seen()
for name, (outputs, linear) in (("memory_efficient_linear: false", without), ("zero.Init as it is", after)):
    differ = (outputs != before[0]).float().mean()
    print(f"{name}: linear replaced: {linear is not before[1]}, outputs of the other model that differ: {differ:.0%}")
assert without[1] is before[1] and torch.equal(without[0], before[0])
assert after[1] is not before[1] and not torch.equal(after[0], before[0])
PY
