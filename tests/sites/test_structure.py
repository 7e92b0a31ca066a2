"""Layers that no family names, read by their structure: norms before and after, shared key heads, no experts."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmpeft_ds.sites import find_sites
from tests.helpers.models import tiny_families


def text_sites(family):
    config = tiny_families.config_of(family)
    with torch.device("meta"):
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    sites = find_sites(model)
    return [s for s in sites.attention if s.modality == "text"], [s for s in sites.ffn if s.modality == "text"]


# family -> norm and last module of attention, norm and last module of the feed-forward block, in the layer; pre_norm
NORMS = {
    "qwen3_vl": ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj", True),
    "gemma3": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        True,
    ),
    "glm4v": (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
        True,
    ),
    "exaone4_5": (
        "post_attention_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "post_feedforward_layernorm",
        False,
    ),
}


@pytest.mark.parametrize("family", NORMS)
def test_norms_stand_where_the_layer_has_them(family):
    attention, ffn = text_sites(family)
    assert [s.layer for s in attention] == [0, 1]
    for a, f in zip(attention, ffn or [None] * 2, strict=True):
        assert (a.heads, a.kv_heads, a.head_dim, a.causal, a.in_width) == (4, 2, 8, True, 32)
        seen = (a.norm, a.end, f and f.norm, f and f.end)
        wanted = [f"{a.block}.{name}" for name in NORMS[family][:4]]
        assert list(seen) == (wanted if f else [*wanted[:2], None, None])
        assert a.pre_norm is NORMS[family][4]


def test_a_block_of_experts_has_no_feed_forward_site():
    attention, ffn = text_sites("qwen3_vl_moe")
    assert len(attention) == 2 and not ffn
