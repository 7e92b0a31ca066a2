#!/usr/bin/env bash
# peft: merging and unmerging, or disabling an adapter while it is merged, leaves a bfloat16 base changed for good.
#
# A good guess: merge_adapter() followed by unmerge_adapter(), and disable_adapter(), give the base back as it was.
# What happens: unmerging subtracts the rounded difference from the rounded sum. In bfloat16 and float16 a large share of
#   the base's weights stays different, here a third (in float32 a tenth, by the last digit). disable_adapter() on a merged
#   model unmerges, so it is not the base either.
# Source: peft.tuners.lora.layer.Linear.merge and unmerge (`weight.data += delta`, `-= delta`).
# Who is hurt: servers that switch adapters by merging, evaluations "with and without adapter", hashes of the base.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from peft import LoraConfig, get_peft_model

def adapted(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    return model, model.base_model.model[0].base_layer.weight

seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    model, weight = adapted(dtype)
    before, shares = weight.detach().clone(), []
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
        shares.append(round((weight != before).float().mean().item(), 3))
    print(f"{dtype}: share of the base's weights that differ after 1, 2, 3 rounds of merging and unmerging: {shares}")
    seen[dtype] = shares
model, weight = adapted(torch.bfloat16)
x = torch.randn(4, 256, dtype=torch.bfloat16)
with model.disable_adapter():
    before = model(x)
model.merge_adapter()
with model.disable_adapter():
    after = model(x)
print("disable_adapter() before and after merge_adapter() gives equal outputs:", torch.equal(before, after))
assert seen[torch.bfloat16][0] > 0.05 and seen[torch.float16][0] > 0.05 and not torch.equal(before, after)
PY
