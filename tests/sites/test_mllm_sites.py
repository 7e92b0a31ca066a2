"""Sites of language models with grouped-query attention, alone and inside multimodal models."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralModel, Qwen2Config, Qwen2ForCausalLM

from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.base import features
from tests.helpers.models.tiny_mllm import FAMILIES, HEADS, INNER, KV_HEADS, LAYERS, TEXT, WIDTH

ALONE = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**TEXT)), "model"),
    "mistral": (lambda: MistralModel(MistralConfig(**TEXT)), ""),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT)), "model"),
}


def check_text_tower(model, sites, tower):
    attention = [s for s in sites.attention if s.tower == tower]
    ffn = [s for s in sites.ffn if s.tower == tower]
    assert [s.layer for s in attention] == [s.layer for s in ffn] == list(range(LAYERS))
    for s in attention:
        assert (s.modality, s.causal, s.pre_norm, s.cross, s.fused) == ("text", True, True, False, False)
        assert (s.heads, s.kv_heads, s.head_dim, s.in_width) == (HEADS, KV_HEADS, WIDTH // HEADS, WIDTH)
        assert (s.q.width, s.k.width, s.v.width) == (WIDTH, WIDTH // 2, WIDTH // 2)
        for p in (s.q, s.k, s.v, s.out):
            assert features(model.get_submodule(p.path)) == (p.in_width, p.width)
    for s in ffn:
        assert (s.up.width, s.gate.width, s.down.in_width, s.down.width) == (INNER, INNER, INNER, WIDTH)
        assert s.activation == "silu"
    for s in (*attention, *ffn):
        assert type(model.get_submodule(s.norm)).__name__.endswith("RMSNorm")
        assert model.get_submodule(s.block) is not None and s.end.startswith(f"{s.block}.")


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_language_models_with_shared_key_heads(name, device):
    build, tower = ALONE[name]
    with torch.device(device):
        model = build()
    sites = find_sites(model)
    assert sites.towers == {tower: "text"}
    check_text_tower(model, sites, tower)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_multimodal_models_have_both_towers(name, device):
    config, stock, text, image = FAMILIES[name]
    with torch.device(device):
        model = stock(config())
    sites = find_sites(model)
    assert sites.towers == {text: "text", image: "image"}
    check_text_tower(model, sites, text)
    attention = [s for s in sites.attention if s.modality == "image"]
    assert [s.layer for s in attention] == [0, 1, 2]
    qwen = name.startswith("qwen")
    for s in attention:
        assert (s.tower, s.causal, s.heads, s.kv_heads, s.head_dim, s.fused) == (image, False, 2, 2, 8, qwen)
        if qwen:
            assert [p.start for p in (s.q, s.k, s.v)] == [0, 16, 32]
            assert features(model.get_submodule(s.q.path)) == (16, 48)
    activations = {s.activation for s in sites.ffn if s.modality == "image"}
    assert activations == {"silu" if name == "qwen2_5_vl" else "quick_gelu"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_look_through_adapters_sees_the_same_paths(name):
    config, stock, *_ = FAMILIES[name]
    model = stock(config())
    before = find_sites(model)
    paths = [s.v.path for s in before.attention]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=paths, r=2))
    assert find_sites(tuned.get_base_model()) == before
