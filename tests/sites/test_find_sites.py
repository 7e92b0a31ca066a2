"""Sites of every family: full paths that exist, right sizes; on meta, composed and wrapped models."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import mmpeft_ds
from mmpeft_ds.sites import find_sites

D, N = 16, 2
BASE = {"hidden_size": D, "num_hidden_layers": N, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**BASE, "vocab_size": 11}
IMAGE = {**BASE, "image_size": 8, "patch_size": 4}


def clip():
    config = CLIPConfig(text_config={**TEXT, "projection_dim": 8}, vision_config={**IMAGE, "projection_dim": 8})
    assert isinstance(config.text_config, CLIPTextConfig) and isinstance(config.vision_config, CLIPVisionConfig)
    return CLIPModel(config)


def gpt2(**options):
    ids = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=D, n_layer=N, n_head=2, n_inner=32, **ids, **options))


# name -> (model, towers, attention sites per layer)
MODELS = {
    "bert": (lambda: BertModel(BertConfig(**TEXT)), {"": "text"}, 1),
    "bert_cross": (lambda: BertModel(BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)), {"": "text"}, 2),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT)), {"roberta": "text"}, 1),
    "gpt2": (gpt2, {"transformer": "text"}, 1),
    "gpt2_cross": (lambda: gpt2(add_cross_attention=True), {"transformer": "text"}, 2),
    "vit": (lambda: ViTModel(ViTConfig(**IMAGE)), {"": "image"}, 1),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**{**IMAGE, "mlp_ratio": 2})), {"": "image"}, 1),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**IMAGE)), {"": "image"}, 1),
    "clip": (clip, {"text_model": "text", "vision_model": "image"}, 1),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_site_names_modules_that_exist_with_their_true_sizes(name, device):
    build, towers, per_layer = MODELS[name]
    with torch.device(device):
        model = build()
    sites = find_sites(model)
    assert sites.towers == towers
    assert len(sites.attention) == N * per_layer * len(towers)
    assert [s.layer for s in sites.ffn] == list(range(N)) * len(towers)
    for site in sites.attention:
        assert model.get_submodule(site.path) is not None
        assert isinstance(model.get_submodule(site.norm), nn.LayerNorm)
        assert (site.heads, site.in_width) == (2, D)
        for p in (site.q, site.k, site.v, site.out):
            rows, columns = oriented(model.get_submodule(p.path))
            assert (p.in_width, p.width) == (columns, D) and p.start + p.width <= rows
        assert site.fused == (name.startswith("gpt2") and not site.cross)
    for site in sites.ffn:
        assert isinstance(model.get_submodule(site.norm), nn.LayerNorm)
        assert (site.up.in_width, site.up.width, site.down.in_width, site.down.width) == (D, 32, 32, D)


def oriented(linear):
    """(out, in) of a Linear or Conv1D."""
    rows, columns = linear.weight.shape
    return (columns, rows) if type(linear).__name__ == "Conv1D" else (rows, columns)


def test_fused_parts_are_the_slices_that_the_model_splits():
    site = find_sites(gpt2()).attention[0]
    assert [p.start for p in (site.q, site.k, site.v)] == [0, D, 2 * D]
    assert site.causal and site.pre_norm


def test_causality_is_told_apart():
    sites = find_sites(clip())
    assert {(s.modality, s.causal) for s in sites.attention} == {("text", True), ("image", False)}
    assert not any(s.causal for s in find_sites(MODELS["bert"][0]()).attention)
    decoder = find_sites(MODELS["bert_cross"][0]()).attention
    assert [(s.cross, s.causal) for s in decoder] == [(False, True), (True, False)] * N


def test_composed_model_has_the_sites_of_both_towers():
    model = nn.ModuleDict({"eye": MODELS["vit"][0](), "mouth": MODELS["bert"][0]()})
    sites = find_sites(model)
    assert sites.towers == {"eye": "image", "mouth": "text"}
    assert all(s.path.startswith(f"{s.tower}.") for s in (*sites.attention, *sites.ffn))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_wrapped_model_keeps_its_sites(name):
    model = MODELS[name][0]()
    before = find_sites(model)
    wrapped = peft.get_peft_model(model, mmpeft_ds.RoutedLoraConfig(r=4, train_norms=True))
    assert find_sites(wrapped.get_base_model()) == before


def test_sizes_are_not_read_from_partitioned_weights():
    model = MODELS["gpt2"][0]()
    before = find_sites(model)
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.data = torch.empty(0)
    assert find_sites(model) == before


def test_a_model_of_unknown_layers_has_no_sites():
    assert find_sites(nn.Linear(2, 2)).attention == []
