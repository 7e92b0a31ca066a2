"""Sites of BLIP's towers: fused vision projections, self- and cross-attention of text, causality per tower."""

import pytest
import torch
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipTextModel,
)

from mmpeft_ds.sites import find_sites

D, N = 16, 2
BASE = {"hidden_size": D, "num_hidden_layers": N, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**BASE, "vocab_size": 11, "encoder_hidden_size": D}
IMAGE = {**BASE, "image_size": 8, "patch_size": 4}
TOWERS = {
    BlipForConditionalGeneration: ["vision_model", "text_decoder.bert"],
    BlipForQuestionAnswering: ["vision_model", "text_encoder", "text_decoder.bert"],
    BlipForImageTextRetrieval: ["vision_model", "text_encoder"],
}


def build(cls, device="cpu"):
    with torch.device(device):
        return cls(BlipConfig(text_config=TEXT, vision_config=IMAGE))


@pytest.mark.parametrize("cls", TOWERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_tower_has_its_sites_in_order(cls, device):
    model = build(cls, device)
    sites = find_sites(model)
    assert list(sites.towers) == TOWERS[cls]
    for tower, modality in sites.towers.items():
        attention = [s for s in sites.attention if s.tower == tower]
        text = modality == "text"
        assert [s.cross for s in attention] == ([False, True] * N if text else [False] * N)
        assert [s.causal for s in attention] == ([tower.endswith("bert"), False] * N if text else [False] * N)
        assert [s.layer for s in sites.ffn if s.tower == tower] == list(range(N))
        assert all(s.fused != text and s.pre_norm != text for s in attention)
    for site in (*sites.attention, *sites.ffn):
        assert isinstance(model.get_submodule(site.norm), nn.LayerNorm)
        assert isinstance(model.get_submodule(site.end), nn.Dropout if site.modality == "text" else nn.Linear)
        assert type(model.get_submodule(site.block)).__name__ in ("BlipTextLayer", "BlipEncoderLayer")
    assert all(s.activation == "gelu" and s.up.width == 32 and s.down.width == D for s in sites.ffn)


def test_fused_slices_are_those_that_the_vision_tower_splits():
    torch.manual_seed(0)
    attention = build(BlipForConditionalGeneration).vision_model.encoder.layers[0].self_attn
    site = find_sites(nn.ModuleList([_layer(attention)])).attention[0]
    assert [(p.start, p.width) for p in (site.q, site.k, site.v)] == [(0, D), (D, D), (2 * D, D)]
    with torch.no_grad():
        x = torch.randn(1, 5, D)
        parts = [attention.qkv(x)[..., p.start : p.start + p.width] for p in (site.q, site.k, site.v)]
        q, k, v = (t.view(1, 5, site.heads, -1).transpose(1, 2) for t in parts)
        context = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 5, D)
        torch.testing.assert_close(attention(x)[0], attention.projection(context))


def _layer(attention):
    layer = build(BlipForConditionalGeneration).vision_model.encoder.layers[0]
    layer.self_attn = attention
    return layer


def test_a_text_tower_without_cross_attention_has_self_attention_alone():
    model = BlipTextModel(BlipTextConfig(**TEXT, is_decoder=False))
    assert [s.cross for s in find_sites(model).attention] == [False] * N
