"""Qwen2-VL and Qwen2.5-VL: text layers like Llama's; vision blocks with q, k and v fused.

The vision tower sees the patches of all images in one sequence without a batch dimension, (patches, d): its layers
attend within one image (or window) each.
"""

from __future__ import annotations

from mmpeft_ds.sites.base import AttentionSite, Block, Family, Sites
from mmpeft_ds.sites.common.pre_norm import feed_forward
from mmpeft_ds.sites.families import llama


def read_vision(block: Block) -> Sites:
    """Sites of one vision block."""
    path, attention = block.path, block.module.attn
    d = attention.dim
    site = AttentionSite(
        path=f"{path}.attn",
        tower=block.tower,
        modality=block.modality,
        layer=block.layer,
        q=block.projection("attn.qkv", 0, d),
        k=block.projection("attn.qkv", d, d),
        v=block.projection("attn.qkv", 2 * d, d),
        out=block.projection("attn.proj"),
        heads=attention.num_heads,
        in_width=d,
        norm=f"{path}.norm1",
        pre_norm=True,
        block=path,
    )
    return Sites([site], [feed_forward(block, "norm2", attention)])


ENTRY = Family(
    towers={
        "Qwen2VLTextModel": "text",
        "Qwen2VisionTransformerPretrainedModel": "image",
        "Qwen2_5_VLTextModel": "text",
        "Qwen2_5_VisionTransformerPretrainedModel": "image",
    },
    layers={
        "Qwen2VLDecoderLayer": llama.READ,
        "Qwen2_5_VLDecoderLayer": llama.READ,
        "Qwen2VLVisionBlock": read_vision,
        "Qwen2_5_VLVisionBlock": read_vision,
    },
)
