#!/usr/bin/env bash
# torchao and peft: quantize_ after get_peft_model stores the adapters as int8 too and freezes them, without a word.
#
# A good guess: weights are for quantising where they are frozen; what the model trains, LoRA's matrices, is left alone, in
#   whatever order the two calls come.
# What happens: quantize_ takes every torch.nn.Linear, and lora_A and lora_B are two of them. They become Int8Tensor with
#   requires_grad=False. If nothing else is trained, backward() fails; with modules_to_save, biases or embeddings beside them
#   training goes on and the adapters stay as they were. Quantising first and adding the adapters then is right.
# Source: torchao.quantization.quant_api.quantize_ with its default filter _is_linear; the weights are made anew by
#   Parameter(..., requires_grad=False).
# Who is hurt: QLoRA by torchao on a model that came with its adapters, as from AutoPeftModel or a resumed run.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torchao==0.18.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_

WORDS = 16

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.query = torch.nn.Embedding(WORDS, 64), torch.nn.Linear(64, 64)
        self.norm, self.head = torch.nn.LayerNorm(64), torch.nn.Linear(64, WORDS)

    def forward(self, words):
        return self.head(self.norm(self.query(self.embed(words))))

def adapted(model):
    return get_peft_model(model, LoraConfig(r=8, target_modules=["query"], modules_to_save=["norm"]))

def quantised(model):
    quantize_(model, Int8WeightOnlyConfig())
    return model

words, losses, trained = torch.arange(WORDS), {}, {}
for order, (first, then) in {"adapters, then quantize_": (adapted, quantised), "quantize_, then adapters": (quantised, adapted)}.items():
    torch.manual_seed(0)
    model = then(first(Net()))
    trained[order] = [name for name, weight in model.named_parameters() if weight.requires_grad]
    kind = next(type(weight.data).__name__ for name, weight in model.named_parameters() if "lora_A" in name)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(50):
        loss = torch.nn.functional.cross_entropy(model(words), (words + 1) % WORDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses[order] = loss.item()
    print(f"{order}: lora_A is a {kind}; {sum('lora' in name for name in trained[order])} matrices of LoRA and "
          f"{sum('norm' in name for name in trained[order])} vectors of the norm are trained; loss after 50 steps {losses[order]:.2f}")
assert not any("lora" in name for name in trained["adapters, then quantize_"])
assert sum("lora" in name for name in trained["quantize_, then adapters"]) == 2
assert losses["adapters, then quantize_"] > 3 * losses["quantize_, then adapters"]
PY
