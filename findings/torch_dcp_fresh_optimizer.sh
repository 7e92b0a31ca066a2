#!/usr/bin/env bash
# torch.distributed.checkpoint: a fresh optimizer gets its learning rate back from a checkpoint, and none of its moments.
#
# A good guess: dcp.load(state) puts what was saved into the state, or says that keys do not fit, as load_state_dict does.
# What happens: it fills the keys that the given state holds already. Before its first step an optimizer's state dictionary has
#   param_groups and an empty "state", so that rates and betas come back, the saved moments are passed over, and
#   Adam starts anew in the middle of a run. allow_partial_load=False, the default, checks the other direction only.
#   torch.distributed.checkpoint.state_dict.get_optimizer_state_dict makes the empty moments first, and is right.
# Source: torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.create_local_plan and create_default_local_load_plan.
# Who is hurt: loops that save optimizer.state_dict() by dcp.save: saving works, each resume costs Adam's warm-up, no message.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0

observe <<'PY'
import warnings
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

warnings.simplefilter("ignore")

def fresh(rate):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=rate)

def walk(model, optimizer, steps):
    torch.manual_seed(1)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

model, optimizer = fresh(0.125)
walk(model, optimizer, 20)
dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id="plain")
dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id="helped")

model, again = fresh(5.0)
state = {"model": model.state_dict(), "optimizer": again.state_dict()}
dcp.load(state, checkpoint_id="plain")
again.load_state_dict(state["optimizer"])
moments = sorted(key for key in dcp.FileSystemReader("plain").read_metadata().state_dict_metadata if "exp_avg" in key)
print(f"{len(moments)} moments in the checkpoint, as {moments[0]}; after dcp.load into a fresh AdamW: lr {again.param_groups[0]['lr']}, "
      f"parameters with moments {len(again.state)}")
assert moments and again.param_groups[0]["lr"] == 0.125 and len(again.state) == 0

model, helped = fresh(5.0)
state = {"optimizer": get_optimizer_state_dict(model, helped)}
dcp.load(state, checkpoint_id="helped")
set_optimizer_state_dict(model, helped, state["optimizer"])
first = next(iter(helped.state.values()))
print(f"by get_optimizer_state_dict: parameters with moments {len(helped.state)}, step {int(first['step'])}")
assert len(helped.state) == 2 and int(first["step"]) == 20
PY
