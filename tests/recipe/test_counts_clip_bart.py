"""Trainable parameters of CLIP-BART at real size, on the meta device, as the shipped recipes train it."""

import pytest
import torch
from transformers import BartConfig

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.assembly import resolve
from tests.helpers import ROOT

VISUAL = 1_582_848


@pytest.fixture(scope="module")
def bart_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bart-base")
    layers = {"encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12}
    BartConfig(d_model=768, encoder_ffn_dim=3072, decoder_ffn_dim=3072, **layers).save_pretrained(folder)
    return folder


def counted(recipe):
    backbone = resolve.make_backbone(recipes.components(recipe).backbone, recipe.engine, None)
    method, config = resolve.make_method(recipes.components(recipe).method)
    resolve.check_sites(recipes.components(recipe).method, backbone, method, config)
    with torch.device("meta"):
        parts = resolve.Resolved(recipe, {}, backbone, method, config, [], [], None, None)
        model = resolve.attach(parts, backbone.build(on_meta=True))
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    kinds = {k: sum(sizes[n] for n in names) for k, names in method.kinds(list(sizes)).items()}
    assert sum(kinds.values()) == sum(sizes.values())
    return kinds, sum(p.numel() for p in model.get_base_model().parameters()) - _copied(model)


def _copied(model):
    """Frozen originals of what an adapter copies: the published totals count them once."""
    return sum(p.numel() for n, p in model.named_parameters() if ".original_module." in n)


@pytest.mark.parametrize(
    ("name", "kinds", "share"),
    [
        ("lora", {"peft": 7_077_888, "norm": 0, "bias": 125_952, "head": VISUAL}, 5.93),
        ("adapter", {"peft": 4_449_600, "norm": 49_152, "bias": 0, "head": VISUAL}, 4.18),
    ],
)
def test_the_published_counts_come_out_of_the_shipped_recipes(bart_base, name, kinds, share):
    path = ROOT / "recipes" / f"clip_bart_multitask_{name}.yaml"
    recipe = recipes.load(path, [f"backbone.text={bart_base}"])
    got, total = counted(recipe)
    assert got == kinds
    trained = sum(kinds.values())
    assert trained == {"lora": 8_786_688, "adapter": 6_081_600}[name]
    # copies of biases and norms stand beside the frozen ones; the published total has them once
    assert round(100 * trained / (total - kinds["norm"] - kinds["bias"]), 2) == share


@pytest.mark.parametrize(
    ("change", "peft"),
    [
        ("method.targets=[q, k, v]", 3 * 7_077_888 // 2),
        ("method.tower=text_model.model.encoder", 7_077_888 // 3),
        ("method.route=none", 7_077_888),
    ],
)
def test_the_count_follows_the_recipe(bart_base, change, peft):
    path = ROOT / "recipes" / "clip_bart_multitask_lora.yaml"
    got, _ = counted(recipes.load(path, [f"backbone.text={bart_base}", change]))
    assert got["peft"] == peft
