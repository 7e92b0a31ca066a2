#!/usr/bin/env bash
# transformers: Llama 4's attention temperature counts places in the row, padding and other texts included, whatever position_ids say.
#
# A good guess: the temperature grows with a token's position, which position_ids give; a text has the same logits alone, padded on the
#   left, and in a packed row.
# What happens: it is computed from arange over the row. Padding on the left, or the texts before it in a packed row, make queries
#   sharper. With the released floor_scale of 8,192 it shows in rows beyond that length only; here floor_scale is 4, to see it in few tokens.
# Source: transformers.models.llama4.modeling_llama4.Llama4TextAttention.forward (attn_temperature_tuning).
# Who is hurt: packed training and batched generation with long rows: no warning, and logits that depend on what else is in the batch.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0

observe <<'PY'
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

def difference(tuned):
    """Of the last logits of a text with and without padding before it, through their size."""
    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[0, 0], initializer_range=0.3,
        attn_temperature_tuning=tuned, floor_scale=4, attn_scale=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    text, padding = torch.randint(3, 64, (1, 10)), torch.zeros(1, 6, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(text)], 1)
    with torch.no_grad():
        alone = model(input_ids=text).logits[0, -1]
        padded = model(input_ids=torch.cat([padding, text], 1), attention_mask=mask,
                       position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[0, -1]
    return ((alone - padded).abs().max() / alone.abs().max()).item()

tuned, plain = difference(True), difference(False)
print(f"logits with and without padding on the left differ by {tuned:.1e} of themselves; without the temperature by {plain:.1e}")
assert tuned > 1e-2 and plain < 1e-5
PY
