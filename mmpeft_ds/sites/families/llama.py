"""Llama, Mistral and Qwen2: causal; RMSNorm before each sublayer; k and v in fewer heads than q; gated MLP."""

from mmpeft_ds.sites.base import Family
from mmpeft_ds.sites.common.pre_norm import reader

READ = reader(
    "self_attn",
    "o_proj",
    "config.num_attention_heads",
    ("input_layernorm", "post_attention_layernorm"),
    causal=lambda block: True,
)
NAMES = ("Llama", "Mistral", "Qwen2")
ENTRY = Family(towers={f"{n}Model": "text" for n in NAMES}, layers={f"{n}DecoderLayer": READ for n in NAMES})
