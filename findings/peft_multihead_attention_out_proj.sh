#!/usr/bin/env bash
# peft on torch.nn.MultiheadAttention: LoRA on "out_proj", by name or by "all-linear", is attached and has no effect.
#
# A good guess: out_proj is a Linear inside the attention block, so LoRA on it trains; a target that cannot work is refused.
# What happens: MultiheadAttention reads out_proj.weight itself and never calls the module. The adapter is attached, counted
#   as trainable, saved; it gets no gradient and changes no output, without a word. Naming the attention module itself works.
#   Seen in transformers' SigLIP, whose pooling head holds such a block (and so in open_clip's towers).
# Source: peft.tuners.lora.model.LoraModel._create_and_replace (no check of the parent), torch.nn.MultiheadAttention.forward.
# Who is hurt: adapters on CLIP towers of open_clip and on SigLIP: fewer parameters train than the table says; DDP and ZeRO
#   meet parameters that never get a gradient.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import SiglipVisionConfig, SiglipVisionModel

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = torch.nn.MultiheadAttention(64, 4, batch_first=True), torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])

def without_gradient(model, x, **outputs):
    result = model(x)
    (result.pooler_output if hasattr(result, "pooler_output") else result).square().sum().backward()
    return sorted(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)

for targets in (["out_proj", "fc"], "all-linear", ["attn", "fc"]):
    torch.manual_seed(0)
    model = get_peft_model(Block(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    idle = without_gradient(model, torch.randn(2, 5, 64))
    print(f"block of nn.MultiheadAttention, target_modules {targets}: adapters without a gradient: {len(idle)}")
    assert len(idle) == (0 if "attn" in targets else 2), idle

config = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                            patch_size=16)
model = get_peft_model(SiglipVisionModel(config), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
idle = without_gradient(model, torch.randn(2, 3, 32, 32))
print("SigLIP vision tower, all-linear: adapters without a gradient:", *idle, sep="\n  ")
assert len(idle) == 2 and all("head.attention.out_proj" in name for name in idle), idle
PY
