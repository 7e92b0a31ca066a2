#!/usr/bin/env bash
# DeepSpeed: zero.Init overrules the dtype that a layer asks for.
#
# A good guess: zero.Init splits parameters over ranks and leaves their dtype to the model: Linear(..., dtype=bfloat16), or a
#   checkpoint loaded in bfloat16, stays bfloat16; a float32 layer stays float32.
# What happens: the dtype of the configuration wins. Without bf16 in it, dtype=bfloat16 is built as float32 (twice the
#   memory for a frozen base); with bf16 in it, a plain float32 layer is built as bfloat16. Only a later .bfloat16() is kept.
# Source: deepspeed.runtime.zero.partition_parameters: InsertPostInitMethodToModuleSubClasses replaces torch.empty, torch.zeros
#   and others by zero_wrapper_for_fp_tensor_constructor, which casts; _set_dtype chooses the type from the configuration.
# Who is hurt: frozen bfloat16 models under ZeRO 3 whose trainable part shall stay float32.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import torch, deepspeed

deepspeed.init_distributed("gloo", verbose=False)
seen = {}
for enabled in (True, False):
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}, "bf16": {"enabled": enabled}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        layers = {"Linear(dtype=bfloat16)": torch.nn.Linear(6, 6, dtype=torch.bfloat16),
                  "Linear()": torch.nn.Linear(6, 6),
                  "Linear().bfloat16()": torch.nn.Linear(6, 6).bfloat16()}
    for name, layer in layers.items():
        print(f"bf16.enabled {enabled!s:5}: {name} is built as {layer.weight.dtype}")
        seen[enabled, name] = layer.weight.dtype
assert seen[False, "Linear(dtype=bfloat16)"] == torch.float32 and seen[True, "Linear()"] == torch.bfloat16
assert seen[False, "Linear().bfloat16()"] == torch.bfloat16
PY
