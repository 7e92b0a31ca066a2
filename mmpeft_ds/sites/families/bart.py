"""BART (LayerNorm after each sublayer) and mBART (before it): encoder and decoder layers are classes of their own."""

from __future__ import annotations

from collections.abc import Callable

from mmpeft_ds.sites.base import AttentionSite, Block, Family, FFNSite, Sites


def _reader(pre_norm: bool) -> Callable[[Block], Sites]:
    def read(block: Block) -> Sites:
        """Sites of one layer. Its dropouts are functional, so a sublayer ends with its last projection."""
        layer, path = block.module, block.path
        where = {"tower": block.tower, "modality": block.modality, "layer": block.layer}

        def attention(name: str, cross: bool) -> AttentionSite:
            module, q = layer.get_submodule(name), block.projection(f"{name}.q_proj")
            return AttentionSite(
                path=f"{path}.{name}",
                **where,
                q=q,
                k=block.projection(f"{name}.k_proj"),
                v=block.projection(f"{name}.v_proj"),
                out=block.projection(f"{name}.out_proj"),
                heads=module.num_heads,
                in_width=q.in_width,
                norm=f"{path}.{name}_layer_norm",
                pre_norm=pre_norm,
                cross=cross,
                causal=module.is_causal,
                block=path,
            )

        sites = [attention("self_attn", cross=False)]
        if hasattr(layer, "encoder_attn"):
            sites.append(attention("encoder_attn", cross=True))
        ffn = FFNSite(
            path=path,
            **where,
            up=block.projection("fc1"),
            down=block.projection("fc2"),
            norm=f"{path}.final_layer_norm",
            pre_norm=pre_norm,
            activation=layer.self_attn.config.activation_function,
            block=path,
        )
        return Sites(sites, [ffn])

    return read


PRE_NORM = {"Bart": False, "MBart": True}
ENTRY = Family(
    towers={f"{name}{part}": "text" for name in PRE_NORM for part in ("Encoder", "Decoder")},
    layers={f"{name}{part}Layer": _reader(pre) for name, pre in PRE_NORM.items() for part in ("Encoder", "Decoder")},
)
