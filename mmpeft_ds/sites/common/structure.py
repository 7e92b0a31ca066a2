"""Layers that no family names, read by their shape: separate q, k, v and output projections, a feed-forward block.

Most language models and vision towers of transformers look alike in this. A block of experts, and attention with fused
or low-rank projections, are left out: they have no site, so methods that need one say so.
"""

from __future__ import annotations

from torch import nn

from mmpeft_ds.sites.base import Block, FFNSite, Sites, base_layer, features
from mmpeft_ds.sites.common.pre_norm import GATED
from mmpeft_ds.sites.common.separate import attention_site, ffn_site

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_OUT = ("o_proj", "out_proj", "proj", "dense")
# Names of the norms before attention and before the feed-forward block; of those after each, before the residual add.
_BEFORE = (
    ("input_layernorm", "layer_norm1", "norm1", "operator_norm", "attention_norm", "layernorm_before"),
    ("pre_feedforward_layernorm", "post_attention_layernorm", "layer_norm2", "norm2", "ffn_norm", "layernorm_after"),
)
_AFTER = (
    ("post_self_attn_layernorm", "post_attention_layernorm", "post_attention_norm"),
    ("post_feedforward_layernorm", "post_mlp_layernorm"),
)
# The widening projections, the gate first where there is one, and the narrowing one.
_FEED_FORWARD = (GATED, ("fc1", "fc2"), ("up_proj", "down_proj"))
_IMAGES = ("vision", "visual", "image", "vit")


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is a transformer layer that can be read."""
    return _attention(module) is not None


def has_attention(module: nn.Module) -> bool:
    """Whether `module` is a transformer layer, of whatever form."""
    return any(isinstance(getattr(module, name, None), nn.Module) for name in _ATTENTION)


def tower(path: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Path and modality of the tower that has the layer at `path`: the innermost model of transformers around it."""
    parent = path.rpartition(".")[0]
    while parent and all(c.__name__ != "PreTrainedModel" for c in type(modules[parent]).__mro__):
        parent = parent.rpartition(".")[0]
    words = parent.lower() or type(modules[parent]).__name__.lower()
    return parent, "image" if any(word in words for word in _IMAGES) else "text"


def read(block: Block) -> Sites:
    """Sites of one layer."""
    name, out = _attention(block.module)
    module = block.module.get_submodule(name)
    # A norm that stands after a sublayer makes the one of the next sublayer hard to tell by its name alone.
    sandwich = hasattr(block.module, "pre_feedforward_layernorm") or hasattr(block.module, "post_self_attn_layernorm")
    norms = [_named(block.module, names) for names in _BEFORE]
    behind = [_named(block.module, names) for names in _AFTER] if sandwich or norms[0] is None else [None, None]
    pre_norm = norms[0] is not None
    if not pre_norm:
        norms = behind
    causal = bool(getattr(module, "is_causal", block.modality == "text"))
    site = attention_site(block, name, out, _heads(module), norms[0], causal, pre_norm, behind[0])
    return Sites([site], _feed_forward(block, module, norms[1], pre_norm, behind[1]))


def _feed_forward(
    block: Block, attention: nn.Module, norm: str | None, pre_norm: bool, behind: str | None
) -> list[FFNSite]:
    name = next((n for n in ("mlp", "feed_forward") if hasattr(block.module, n)), None)
    if name is None:
        return []
    module = getattr(block.module, name)
    parts = next((p for p in _FEED_FORWARD if all(hasattr(module, n) for n in p)), ())
    if not parts or not all(isinstance(base_layer(getattr(module, n)), nn.Linear) for n in parts):
        return []
    config = vars(module).get("config") or vars(attention).get("config")
    activations = (getattr(config, n, None) for n in ("hidden_act", "hidden_activation", "activation_function"))
    activation = next((a for a in activations if isinstance(a, str)), "gelu")
    return [ffn_site(block, name, parts, activation, norm, pre_norm, behind)]


def _attention(module: nn.Module) -> tuple[str, str] | None:
    """Name of the attention module of a layer, and of the output projection in it; None where it cannot be read."""
    for name in _ATTENTION:
        attention = getattr(module, name, None)
        if isinstance(attention, nn.Module):
            out = next((n for n in _OUT if hasattr(attention, n)), None)
            linear = (getattr(attention, n, None) for n in ("q_proj", "k_proj", "v_proj", out or ""))
            if out and all(isinstance(p, nn.Module) and isinstance(base_layer(p), nn.Linear) for p in linear):
                return name, out
    return None


def _heads(attention: nn.Module) -> int:
    size = getattr(attention, "head_dim", None)
    if isinstance(size, int):
        return features(base_layer(attention.q_proj))[1] // size
    return getattr(attention, "num_heads", None) or attention.config.num_attention_heads


def _named(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if hasattr(layer, name)), None)
