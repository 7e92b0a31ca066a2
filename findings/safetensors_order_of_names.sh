#!/usr/bin/env bash
# safetensors: tensors come back in another order than they were saved in, and two ways of reading differ too.
#
# A good guess: save_file(dict) and load_file keep the order of the dict, as torch.save does.
# What happens: the file is laid out by size of dtype (large ones first), then by name; load_file gives that order, safe_open's
#   keys() the alphabetical one. With one dtype only, names sort as text: layer.10 before layer.2.
# Source: safetensors' Rust function prepare (sorting by dtype, then name) and safe_open.keys.
# Who is hurt: code that pairs values() with model.parameters(), with optimiser states, or with another file.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 safetensors==0.8.0 numpy==2.4.6

observe <<'PY'
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

tensors = {"layer.2": torch.ones(2), "layer.10": torch.ones(2), "head": torch.ones(2, dtype=torch.bfloat16), "step": torch.tensor(3)}
save_file(tensors, "x.safetensors")
with safe_open("x.safetensors", "pt") as file:
    opened = list(file.keys())
loaded = list(load_file("x.safetensors"))
print("saved:", list(tensors), "load_file:", loaded, "safe_open().keys():", opened, sep="\n  ")
assert loaded == ["step", "layer.10", "layer.2", "head"] and opened == ["head", "layer.10", "layer.2", "step"]
PY
