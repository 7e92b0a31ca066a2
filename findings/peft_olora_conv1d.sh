#!/usr/bin/env bash
# peft: with init_lora_weights "olora", a fresh adapter on GPT-2's Conv1D is another model, or fails in the first forward.
#
# A good guess: fan_in_fan_out=True, which peft sets by itself for Conv1D, serves every way of initialising; a fresh adapter
#   leaves the outputs as they are, as with "pissa".
# What happens: the factors are taken of the weight as it is stored, in x out, and used as those of out x in. Where input and
#   output are equally wide the outputs differ by two thirds, without a word; elsewhere the shapes do not fit.
# Source: peft.tuners.lora.layer.LoraLayer.olora_init, which does not transpose, where pissa_init does.
# Who is hurt: OLoRA on GPT-2 and what is built on it; c_proj of attention is square.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

def adapted(out, init):
    torch.manual_seed(0)
    base = torch.nn.Sequential(Conv1D(out, 64))
    torch.nn.init.normal_(base[0].weight, std=0.1)
    x = torch.randn(8, 64)
    before = base(x)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0"], init_lora_weights=init, fan_in_fan_out=True))
    return ((model(x) - before).norm() / before.norm()).item()

far = {init: adapted(64, init) for init in (True, "pissa", "olora")}
print("Conv1D of 64 x 64, relative distance of the fresh adapter's outputs to the base's:", far)
try:
    adapted(96, "olora")
    error = None
except RuntimeError as raised:
    error = str(raised)
print("olora on a Conv1D of 64 x 96:", error)
assert far[True] == 0 and far["pissa"] < 1e-5 and far["olora"] > 0.1 and error is not None
PY
