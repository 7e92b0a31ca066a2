"""DINOv2; the giant size has a gated feed-forward block."""

from mmpeft_ds.sites.base import Family
from mmpeft_ds.sites.common.pre_norm import reader

READ = reader("attention", "o_proj", "num_attention_heads", ("norm1", "norm2"), gated_activation="silu")
ENTRY = Family(towers={"Dinov2Model": "image", "Dinov2Backbone": "image"}, layers={"Dinov2Layer": READ})
