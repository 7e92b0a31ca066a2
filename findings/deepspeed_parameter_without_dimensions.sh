#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: a model with a parameter of shape () cannot be loaded under zero.Init.
#
# A good guess: a learned temperature or scale, nn.Parameter(torch.tensor(2.66)), is a parameter like any other of one element;
#   a tensor of shape (1,) in its place works.
# What happens: zero.Init, and so from_pretrained of transformers under a stage 3 configuration, ends with a RuntimeError of
#   torch about viewing a tensor of 0 dimensions as bytes, which names neither the parameter nor the module.
# Source: deepspeed.runtime.zero.partition_parameters, Init: new parameters are broadcast from rank 0 through a view as bytes.
# Who is hurt: CLIP, SigLIP, VisionTextDualEncoder and every model with a learned temperature of shape ().
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import torch, deepspeed

deepspeed.init_distributed("gloo", verbose=False)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}

class Scaled(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(scale)

def loaded(scale):
    try:
        with deepspeed.zero.Init(config_dict_or_path=config):
            Scaled(scale)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "loaded"

for name, scale in (("shape (1,)", torch.tensor([2.66])), ("shape ()", torch.tensor(2.66))):
    said = loaded(scale)
    if deepspeed.comm.get_rank() == 0:
        print(f"{name}: {said}")
    assert (said == "loaded") == (name == "shape (1,)")
    assert said == "loaded" or "dim() cannot be 0" in said
PY
