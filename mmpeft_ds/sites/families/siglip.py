"""SigLIP: the same layer class in both towers; neither is causal."""

from mmpeft_ds.sites.base import Family
from mmpeft_ds.sites.common.pre_norm import reader

READ = reader("self_attn", "out_proj", "num_heads", ("layer_norm1", "layer_norm2"))
TOWERS = {
    "SiglipVisionModel": "image",
    "SiglipVisionTransformer": "image",
    "SiglipTextModel": "text",
    "SiglipTextTransformer": "text",
}
ENTRY = Family(towers=TOWERS, layers={"SiglipEncoderLayer": READ})
