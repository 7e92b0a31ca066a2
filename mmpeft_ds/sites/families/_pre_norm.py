"""What ViT, DINOv2, CLIP and SigLIP share: separate q, k, v and a LayerNorm before each sublayer."""

from __future__ import annotations

from collections.abc import Callable

from mmpeft_ds.sites.base import AttentionSite, Block, FFNSite, Sites


def reader(
    attention: str, out: str, heads: str, norms: tuple[str, str], causal: Callable[[Block], bool] = lambda block: False
) -> Callable[[Block], Sites]:
    """A function from a layer to its sites.

    Args:
        attention: name of the attention module in the layer.
        out: name of the output projection in it.
        heads: its attribute with the number of heads.
        norms: names of the LayerNorms before attention and before the feed-forward block.
        causal: whether later tokens are masked in this tower.
    """

    def read(block: Block) -> Sites:
        layer, path = block.module, block.path
        module = layer.get_submodule(attention)
        where = {"tower": block.tower, "modality": block.modality, "layer": block.layer}
        q = block.projection(f"{attention}.q_proj")
        site = AttentionSite(
            path=f"{path}.{attention}",
            **where,
            q=q,
            k=block.projection(f"{attention}.k_proj"),
            v=block.projection(f"{attention}.v_proj"),
            out=block.projection(f"{attention}.{out}"),
            heads=getattr(module, heads),
            in_width=q.in_width,
            norm=f"{path}.{norms[0]}",
            pre_norm=True,
            causal=causal(block),
            block=path,
        )
        gated = hasattr(layer.mlp, "gate_proj")
        ffn = FFNSite(
            path=f"{path}.mlp",
            **where,
            up=block.projection("mlp.up_proj" if gated else "mlp.fc1"),
            down=block.projection("mlp.down_proj" if gated else "mlp.fc2"),
            norm=f"{path}.{norms[1]}",
            pre_norm=True,
            activation="silu" if gated else module.config.hidden_act,
            block=path,
            gate=block.projection("mlp.gate_proj") if gated else None,
        )
        return Sites([site], [ffn])

    return read
