"""T5 and mT5: separate q, k, v without biases; an RMS norm before each sublayer; encoder and decoder are one class."""

from __future__ import annotations

from mmpeft_ds.sites.base import AttentionSite, Block, Family, FFNSite, Sites


def read(block: Block) -> Sites:
    """Sites of one T5 block: self-attention, cross-attention in a decoder, (gated) feed-forward."""
    layer, path = block.module, block.path
    where = {"tower": block.tower, "modality": block.modality, "layer": block.layer}

    def attention(at: str, name: str, cross: bool) -> AttentionSite:
        module, q = layer.get_submodule(f"{at}.{name}"), block.projection(f"{at}.{name}.q")
        return AttentionSite(
            path=f"{path}.{at}.{name}",
            **where,
            q=q,
            k=block.projection(f"{at}.{name}.k"),
            v=block.projection(f"{at}.{name}.v"),
            out=block.projection(f"{at}.{name}.o"),
            heads=module.n_heads,
            in_width=q.in_width,
            norm=f"{path}.{at}.layer_norm",
            pre_norm=True,
            cross=cross,
            causal=layer.is_decoder and not cross,
            block=path,
            output=f"{path}.{at}.dropout",
        )

    sites = [attention("layer.0", "SelfAttention", cross=False)]
    if layer.is_decoder:
        sites.append(attention("layer.1", "EncDecAttention", cross=True))
    last = f"layer.{len(layer.layer) - 1}"
    inner = layer.get_submodule(f"{last}.DenseReluDense")
    gated = hasattr(inner, "wi_0")
    ffn = FFNSite(
        path=f"{path}.{last}.DenseReluDense",
        **where,
        up=block.projection(f"{last}.DenseReluDense.{'wi_1' if gated else 'wi'}"),
        down=block.projection(f"{last}.DenseReluDense.wo"),
        norm=f"{path}.{last}.layer_norm",
        pre_norm=True,
        activation=layer.layer[0].SelfAttention.config.dense_act_fn,
        block=path,
        output=f"{path}.{last}.dropout",
        gate=block.projection(f"{last}.DenseReluDense.wi_0") if gated else None,
    )
    return Sites(sites, [ffn])


NAMES = ("T5", "MT5")
ENTRY = Family(towers={f"{n}Stack": "text" for n in NAMES}, layers={f"{n}Block": read for n in NAMES})
