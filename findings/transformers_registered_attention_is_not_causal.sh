#!/usr/bin/env bash
# transformers: a registered attention function gets no mask, so that a decoder sees the tokens that it shall predict.
#
# A good guess: AttentionInterface.register("mine", f) puts f in the place of the eager function, with the same arguments;
#   f that calls the eager function gives the eager model.
# What happens: the attention_mask that f gets is None, for causal models too. With f equal to the eager function, earlier
#   positions change when a later token changes, and padding is attended to. A mask function has to be registered under the
#   same name (AttentionMaskInterface); without it nothing is said.
# Source: transformers.masking_utils._preprocess_mask_arguments: an unknown name skips the mask.
# Who is hurt: adapters and probes that register attention: the training loss is far too good, generation is bad.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import copy, torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

AttentionInterface.register("mine", eager_attention_forward)
AttentionInterface.register("mine_with_mask", eager_attention_forward)
AttentionMaskInterface.register("mine_with_mask", eager_mask)
config = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=50)
seen = {}
for name in ("eager", "mine", "mine_with_mask"):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=name).eval()
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
    seen[name] = (model(one).logits[0, :3] - model(other).logits[0, :3]).abs().max().item()
    print(f"{name}: logits of the first three positions move by {seen[name]:.4f} when the fourth token changes")
assert seen["eager"] == seen["mine_with_mask"] == 0 and seen["mine"] > 1e-3
PY
