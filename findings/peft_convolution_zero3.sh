#!/usr/bin/env bash
# peft with DeepSpeed ZeRO 3: LoRA attaches to the linear layers of a model built under zero.Init, and to no convolution.
#
# A good guess: LoRA attaches to a patch embedding (Conv2d, or Conv3d in the Qwen-VL towers) as to a linear layer, which
#   peft's Linear does at every stage since it reads in_features and out_features.
# What happens: ValueError "Conv3d layer kernel must have 5 dimensions, not 1": a convolution's layer asks the weight for its
#   dimensions, and at stage 3 a weight is an empty tensor of one dimension between uses. The shape would be in weight.ds_shape.
# Source: peft.tuners.lora.layer._ConvNd.__init__ (base_layer.weight.dim()), Conv2d.__init__, Conv3d.__init__.
# Who is hurt: target_modules="all-linear" leaves convolutions alone, but a regular expression over a vision tower often takes
#   its patch embedding along; the recipe works on one GPU and at stages 0 to 2.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8 peft==0.21.2

in_ranks 1 <<'PY'
import torch, deepspeed
from peft import LoraConfig, get_peft_model

deepspeed.init_distributed("gloo", verbose=False)

class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv2d, self.conv3d, self.linear = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Conv3d(3, 8, 2, 2), torch.nn.Linear(8, 8)

def attach(name, stage):
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
        tower = Tower()
    try:
        get_peft_model(tower, LoraConfig(target_modules=[name], r=2))
        return "attached"
    except ValueError as error:
        return f"ValueError: {error}"

seen = {(name, stage): attach(name, stage) for stage in (2, 3) for name in ("linear", "conv2d", "conv3d")}
for (name, stage), what in seen.items():
    print(f"stage {stage}, {name}: {what}")
assert all(seen[name, 2] == "attached" for name in ("linear", "conv2d", "conv3d")) and seen["linear", 3] == "attached"
assert all("dimensions, not 1" in seen[name, 3] for name in ("conv2d", "conv3d"))
PY
