#!/usr/bin/env bash
# peft: a fresh DoRA adapter changes the outputs of a bfloat16 or float16 base.
#
# A good guess: DoRA starts as the identity, like LoRA: the magnitude is initialised with the norms of the weight, B is zero.
# What happens: in float32 it does. On a half-precision base the norm and the division are rounded, so that outputs differ
#   before the first step; LoRA on the same base gives equal outputs to the bit.
# Source: peft.tuners.lora.dora.DoraLinearLayer.forward (mag_norm_scale = magnitude / weight_norm in the base's dtype).
# Who is hurt: checks that "an untrained adapter leaves the model alone", and comparisons that take step 0 as the base.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import copy, torch
from peft import LoraConfig, get_peft_model

seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(256, 256)).to(dtype)
    x = torch.randn(16, 256).to(dtype)
    for use_dora in (False, True):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=["0"], use_dora=use_dora)).eval()
        seen[dtype, use_dora] = (model(x) != base(x)).float().mean().item()
        print(f"{dtype}, {'DoRA' if use_dora else 'LoRA'} before training: share of outputs that differ from the base's: "
              f"{seen[dtype, use_dora]:.3f}")
assert all(share == 0 for (dtype, dora), share in seen.items() if not dora)
assert seen[torch.bfloat16, True] > 0.01 and seen[torch.float16, True] > 0.01 and seen[torch.float32, True] < 0.5
PY
