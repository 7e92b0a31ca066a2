"""CLIP: the same layer class in both towers; the text tower is causal."""

from mmpeft_ds.sites.base import Family
from mmpeft_ds.sites.common.pre_norm import reader

READ = reader(
    "self_attn", "out_proj", "num_heads", ("layer_norm1", "layer_norm2"), causal=lambda block: block.modality == "text"
)
# In older releases a tower holds its layers in an inner module of its own.
TOWERS = {
    "CLIPVisionModel": "image",
    "CLIPVisionTransformer": "image",
    "CLIPTextModel": "text",
    "CLIPTextTransformer": "text",
}
ENTRY = Family(towers=TOWERS, layers={"CLIPEncoderLayer": READ})
