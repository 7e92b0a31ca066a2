"""Structure of ViT, DINOv2, CLIP, SigLIP and Llama-like models: separate q, k, v and a norm before each sublayer."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import nn

from mmpeft_ds.sites.base import Block, FFNSite, Sites
from mmpeft_ds.sites.common.separate import attention_site, ffn_site

GATED = ("gate_proj", "up_proj", "down_proj")


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
        module = block.module.get_submodule(attention)
        site = attention_site(block, attention, out, attrgetter(heads)(module), norms[0], causal(block))
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
    activation = (gated and gated_activation) or attention.config.hidden_act
    return ffn_site(block, "mlp", GATED if gated else ("fc1", "fc2"), activation, norm)
