"""What ViT, DINOv2, CLIP, SigLIP and the Llama kin share: separate q, k, v and a norm before each sublayer."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import nn

from mmpeft_ds.sites.base import AttentionSite, Block, FFNSite, Sites


def reader(
    attention: str,
    out: str,
    heads: str,
    norms: tuple[str, str],
    causal: Callable[[Block], bool] = lambda block: False,
    gated_activation: str | None = None,
) -> Callable[[Block], Sites]:
    """A function from a layer to its sites.

    Args:
        attention: name of the attention module in the layer.
        out: name of the output projection in it.
        heads: where it has the number of query heads, e.g. `num_heads` or `config.num_attention_heads`.
        norms: names of the norms before attention and before the feed-forward block.
        causal: whether later tokens are masked in this tower.
        gated_activation: non-linearity of gated feed-forward blocks, where the family does not take it from its
            configuration.
    """

    def read(block: Block) -> Sites:
        path = block.path
        module = block.module.get_submodule(attention)
        q = block.projection(f"{attention}.q_proj")
        site = AttentionSite(
            path=f"{path}.{attention}",
            tower=block.tower,
            modality=block.modality,
            layer=block.layer,
            q=q,
            k=block.projection(f"{attention}.k_proj"),
            v=block.projection(f"{attention}.v_proj"),
            out=block.projection(f"{attention}.{out}"),
            heads=attrgetter(heads)(module),
            in_width=q.in_width,
            norm=f"{path}.{norms[0]}",
            pre_norm=True,
            causal=causal(block),
            block=path,
        )
        return Sites([site], [feed_forward(block, norms[1], module, gated_activation)])

    return read


def feed_forward(block: Block, norm: str, attention: nn.Module, gated_activation: str | None = None) -> FFNSite:
    """The site of a layer's `mlp`: fc1 and fc2, or gate_proj, up_proj and down_proj.

    Args:
        norm: name of the norm before it.
        attention: the layer's attention module, which holds the configuration of the tower.
        gated_activation: as in `reader`.
    """
    gated = hasattr(block.module.mlp, "gate_proj")
    return FFNSite(
        path=f"{block.path}.mlp",
        tower=block.tower,
        modality=block.modality,
        layer=block.layer,
        up=block.projection("mlp.up_proj" if gated else "mlp.fc1"),
        down=block.projection("mlp.down_proj" if gated else "mlp.fc2"),
        norm=f"{block.path}.{norm}",
        pre_norm=True,
        activation=(gated and gated_activation) or attention.config.hidden_act,
        block=block.path,
        gate=block.projection("mlp.gate_proj") if gated else None,
    )
