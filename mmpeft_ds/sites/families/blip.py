"""BLIP: a vision tower with q, k and v fused in one Linear, and BERT-like text towers with cross-attention."""

from __future__ import annotations

from mmpeft_ds.sites.base import AttentionSite, Block, Family, FFNSite, Sites
from mmpeft_ds.sites.common.post_norm import reader


def read_vision(block: Block) -> Sites:
    """Sites of one pre-norm vision layer; attention and MLP end in a Linear, without a dropout of their own."""
    layer, path = block.module, block.path
    where = {"tower": block.tower, "modality": block.modality, "layer": block.layer}
    d = layer.self_attn.embed_dim
    attention = AttentionSite(
        path=f"{path}.self_attn",
        **where,
        q=block.projection("self_attn.qkv", 0, d),
        k=block.projection("self_attn.qkv", d, d),
        v=block.projection("self_attn.qkv", 2 * d, d),
        out=block.projection("self_attn.projection"),
        heads=layer.self_attn.num_heads,
        in_width=d,
        norm=f"{path}.layer_norm1",
        pre_norm=True,
        block=path,
    )
    ffn = FFNSite(
        path=f"{path}.mlp",
        **where,
        up=block.projection("mlp.fc1"),
        down=block.projection("mlp.fc2"),
        norm=f"{path}.layer_norm2",
        pre_norm=True,
        activation=layer.mlp.config.hidden_act,
        block=path,
    )
    return Sites([attention], [ffn])


def _writes(block: Block) -> bool:
    """Whether this text tower is the `bert` of a language model: BLIP builds its encoders from the same classes and
    the same config (`is_decoder` adds cross-attention to both); only the caller asks for a causal mask."""
    return block.tower.rpartition(".")[2] == "bert"


ENTRY = Family(
    towers={"BlipTextModel": "text", "BlipVisionModel": "image"},
    layers={"BlipTextLayer": reader(_writes), "BlipEncoderLayer": read_vision},
)
