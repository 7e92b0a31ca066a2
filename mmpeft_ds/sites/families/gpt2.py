"""GPT-2: q, k and v fused in one Conv1D (weights stored in x out); LayerNorm before each sublayer; causal."""

from __future__ import annotations

from mmpeft_ds.sites.base import AttentionSite, Block, Family, FFNSite, Sites


def read(block: Block) -> Sites:
    """Sites of one GPT-2 block: fused q, k, v, and cross-attention where it has one."""
    layer, path = block.module, block.path
    where = {"tower": block.tower, "modality": block.modality, "layer": block.layer}
    d = layer.attn.embed_dim
    attention = [
        AttentionSite(
            path=f"{path}.attn",
            **where,
            q=block.projection("attn.c_attn", 0, d),
            k=block.projection("attn.c_attn", d, d),
            v=block.projection("attn.c_attn", 2 * d, d),
            out=block.projection("attn.c_proj"),
            heads=layer.attn.num_heads,
            in_width=d,
            norm=f"{path}.ln_1",
            pre_norm=True,
            causal=True,
            block=path,
            output=f"{path}.attn.resid_dropout",
        )
    ]
    if hasattr(layer, "crossattention"):
        attention.append(
            AttentionSite(
                path=f"{path}.crossattention",
                **where,
                q=block.projection("crossattention.q_attn"),
                k=block.projection("crossattention.c_attn", 0, d),
                v=block.projection("crossattention.c_attn", d, d),
                out=block.projection("crossattention.c_proj"),
                heads=layer.crossattention.num_heads,
                in_width=d,
                norm=f"{path}.ln_cross_attn",
                pre_norm=True,
                cross=True,
                block=path,
                output=f"{path}.crossattention.resid_dropout",
            )
        )
    ffn = FFNSite(
        path=f"{path}.mlp",
        **where,
        up=block.projection("mlp.c_fc"),
        down=block.projection("mlp.c_proj"),
        norm=f"{path}.ln_2",
        pre_norm=True,
        activation=layer.attn.config.activation_function,
        block=path,
        output=f"{path}.mlp.dropout",
    )
    return Sites(attention, [ffn])


ENTRY = Family(towers={"GPT2Model": "text"}, layers={"GPT2Block": read})
