"""Structure of BERT and BLIP's text towers: separate query, key and value; LayerNorm after the residual add."""

from __future__ import annotations

from collections.abc import Callable

from mmpeft_ds.sites.base import AttentionSite, Block, FFNSite, Sites


def reader(causal: Callable[[Block], bool]) -> Callable[[Block], Sites]:
    """A function from a layer to its sites: self-attention, cross-attention where it has one, feed-forward.

    Args:
        causal: whether later tokens are masked in the self-attention of this layer.
    """

    def read(block: Block) -> Sites:
        layer = block.module
        where = {"tower": block.tower, "modality": block.modality, "layer": block.layer}

        def attention(name: str, cross: bool) -> AttentionSite:
            q = block.projection(f"{name}.self.query")
            return AttentionSite(
                path=f"{block.path}.{name}",
                **where,
                q=q,
                k=block.projection(f"{name}.self.key"),
                v=block.projection(f"{name}.self.value"),
                out=block.projection(f"{name}.output.dense"),
                heads=layer.get_submodule(f"{name}.self").num_attention_heads,
                in_width=q.in_width,
                norm=f"{block.path}.{name}.output.LayerNorm",
                pre_norm=False,
                cross=cross,
                causal=not cross and causal(block),
                block=block.path,
                output=f"{block.path}.{name}.output.dropout",
            )

        sites = [attention("attention", cross=False)]
        if hasattr(layer, "crossattention"):
            sites.append(attention("crossattention", cross=True))
        ffn = FFNSite(
            path=block.path,
            **where,
            up=block.projection("intermediate.dense"),
            down=block.projection("output.dense"),
            norm=f"{block.path}.output.LayerNorm",
            pre_norm=False,
            activation=_name(layer.attention.self.config.hidden_act),
            block=block.path,
            output=f"{block.path}.output.dropout",
        )
        return Sites(sites, [ffn])

    return read


def _name(activation: object) -> str:
    return activation if isinstance(activation, str) else type(activation).__name__
