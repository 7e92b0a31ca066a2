#!/usr/bin/env bash
# peft: an adapter trained with init_lora_weights "pissa_niter_4" gives other outputs after saving and loading.
#
# A good guess: "pissa_niter_4" is a faster "pissa", and an adapter directory loaded onto the same base gives the outputs of
#   the model that was saved.
# What happens: the directory stores the trained A and B, not the residual base that they belong to; loading computes that
#   residual again. For "pissa" the decomposition comes out equal; the fast one is random, so the trained A and B are added to
#   a residual that they never saw. No warning.
# Source: peft.tuners.lora.layer.LoraLayer.pissa_init (torch.svd_lowrank draws from the global generator) and
#   PeftModel.from_pretrained, which attaches with the stored init_lora_weights.
# Who is hurt: whoever takes the recommended fast variant for large models and evaluates in another process.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import copy, torch
from peft import LoraConfig, PeftModel, get_peft_model

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(64, 64))
x = torch.randn(8, 64)
seen = {}
for init in ("pissa", "pissa_niter_4"):
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=["0"], init_lora_weights=init))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained = model(x).detach()
    model.save_pretrained(init)
    seen[init] = [((PeftModel.from_pretrained(copy.deepcopy(base), init)(x) - trained).norm() / trained.norm()).item()
                  for _ in range(2)]
    print(f"{init}: relative distance between the trained model and two loads of its directory: "
          f"{[round(distance, 4) for distance in seen[init]]}")
assert max(seen["pissa"]) < 1e-4 and min(seen["pissa_niter_4"]) > 1e-2 and len(set(seen["pissa_niter_4"])) == 2
PY
