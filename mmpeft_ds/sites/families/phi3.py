"""Phi-3 and Phi-4: q, k and v in one map, as are gate and up of the feed-forward block; k and v in fewer heads than q;
RMSNorm before each sublayer. Adapters at the end of a sublayer stand before its dropout, which is outside of it."""

from __future__ import annotations

from mmpeft_ds.sites.base import AttentionSite, Block, Family, FFNSite, Sites


def read(block: Block) -> Sites:
    """Sites of one layer."""
    path, attention = block.path, block.module.self_attn
    where = {"tower": block.tower, "modality": block.modality, "layer": block.layer, "pre_norm": True, "block": path}
    out, down = block.projection("self_attn.o_proj"), block.projection("mlp.down_proj")
    queries, keys, inner = out.in_width, attention.num_key_value_heads * attention.head_dim, down.in_width
    site = AttentionSite(
        path=f"{path}.self_attn",
        **where,
        q=block.projection("self_attn.qkv_proj", 0, queries),
        k=block.projection("self_attn.qkv_proj", queries, keys),
        v=block.projection("self_attn.qkv_proj", queries + keys, keys),
        out=out,
        heads=attention.config.num_attention_heads,
        in_width=block.projection("self_attn.qkv_proj").in_width,
        norm=f"{path}.input_layernorm",
        causal=True,
    )
    ffn = FFNSite(
        path=f"{path}.mlp",
        **where,
        gate=block.projection("mlp.gate_up_proj", 0, inner),
        up=block.projection("mlp.gate_up_proj", inner, inner),
        down=down,
        norm=f"{path}.post_attention_layernorm",
        activation=attention.config.hidden_act,
    )
    return Sites([site], [ffn])


ENTRY = Family(towers={"Phi3Model": "text"}, layers={"Phi3DecoderLayer": read})
