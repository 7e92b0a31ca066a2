"""ViT."""

from mmpeft_ds.sites.base import Family
from mmpeft_ds.sites.common.pre_norm import reader

READ = reader("attention", "o_proj", "num_attention_heads", ("layernorm_before", "layernorm_after"))
ENTRY = Family(towers={"ViTModel": "image"}, layers={"ViTLayer": READ})
