#!/usr/bin/env bash
# peft: add_weighted_adapter(combination_type="linear") is far from the linear combination of the adapters.
#
# A good guess: "linear" gives w1 * delta1 + w2 * delta2, and weights 1 and -1 give the difference of two adapters.
# What happens: A and B are combined apart, each with the square roots of the weights, so the product holds the cross terms
#   B1 A2 and B2 A1, which are as large as the rest. For two unrelated adapters the relative error is about 1, also for a
#   difference. "cat" gives the exact combination (at the sum of the ranks), and is what the name promises.
# Source: peft.tuners.lora.model.LoraModel._generalized_task_arithmetic_weighted_adapter.
# Who is hurt: averaging adapters of several tasks or seeds, task arithmetic, interpolation between adapters.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config, adapter_name="one")
model.add_adapter("two", config)
layer = model.base_model.model[0]
for weights in ([0.5, 0.5], [1.0, -1.0]):
    expected = weights[0] * layer.get_delta_weight("one") + weights[1] * layer.get_delta_weight("two")
    for kind in ("linear", "cat"):
        name = f"{kind}_{abs(weights[0])}_{weights[1] < 0}".replace(".", "")
        model.add_weighted_adapter(["one", "two"], weights, name, combination_type=kind)
        error = ((layer.get_delta_weight(name) - expected).norm() / expected.norm()).item()
        print(f"weights {weights}, {kind}: relative error against the weighted sum of the two deltas {error:.2e}")
        assert error < 1e-5 if kind == "cat" else error > 0.5
PY
