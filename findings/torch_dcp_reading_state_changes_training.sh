#!/usr/bin/env bash
# torch.distributed.checkpoint: get_optimizer_state_dict of a fresh optimizer takes a step of Adam, and training then differs.
#
# A good guess: asking for a state dictionary reads; a run that writes a checkpoint before its first step trains as one that does not.
# What happens: an optimizer without state is given zero gradients and stepped once with a rate of 0, and the state of that step stays.
#   Adam and AdamW count the step, so that the bias correction of the first real one divides by 1 - 0.999 ** 2 in place of 1 - 0.999: the
#   first step is 0.74 of its size. SGD with dampening takes half, and Rprop and ASGD stand still at first. RMSprop and SGD with momentum
#   alone are as before. Parameters that get no gradient at all have a state from then on.
# Source: torch.distributed.checkpoint.state_dict._init_optim_state ("Whether to recover the lr should not matter too much as we will restore
#   checkpointing later"), called by get_optimizer_state_dict and get_state_dict too, where nothing is restored.
# Who is hurt: a checkpoint at step 0, and comparisons of a run that saved one with another run bit for bit.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 numpy==2.4.6

observe <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def steps(make, read):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    model.register_parameter("unread", torch.nn.Parameter(torch.ones(1)))
    optimizer = make(model.parameters(), lr=0.1)
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    if read:
        get_optimizer_state_dict(model, optimizer)
    lengths = []
    for _ in range(3):
        before = model.weight.detach().clone()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths.append((model.weight.detach() - before).norm().item())
    return lengths, model.unread in optimizer.state


makers = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "Adamax": torch.optim.Adamax, "RAdam": torch.optim.RAdam,
          "Rprop": torch.optim.Rprop, "ASGD": torch.optim.ASGD, "RMSprop": torch.optim.RMSprop,
          "SGD(momentum=0.9)": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
          "SGD(momentum=0.9, dampening=0.5)": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, dampening=0.5)}
first = {}
for name, make in makers.items():
    (plain, had), (read, has) = steps(make, read=False), steps(make, read=True)
    first[name] = round(read[0] / plain[0], 2)
    print(f"{name}: lengths of three steps {[round(v, 4) for v in plain]}, after reading the state before them "
          f"{[round(v, 4) for v in read]}; a parameter without gradients has a state: {had}, {has}")
    if "SGD" not in name:
        assert (had, has) == (False, True)
print("share of the first step that is left:", first)
assert 0.73 < first["Adam"] < 0.76 and 0.73 < first["AdamW"] < 0.76
assert first["Adamax"] < 0.6 and first["RAdam"] < 0.6 and first["SGD(momentum=0.9, dampening=0.5)"] == 0.5
assert first["Rprop"] == first["ASGD"] == 0
assert first["RMSprop"] == first["SGD(momentum=0.9)"] == 1
PY
