"""Trainable parameters of p-Adapter on BLIP-base, on the meta device, as the shipped recipes train it."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BlipConfig, PreTrainedTokenizerFast

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.assembly import resolve
from tests.helpers import ROOT

ATTENTION, FFN = 222_146, 148_320


@pytest.fixture(scope="module")
def blip_base(tmp_path_factory):
    """Configuration and a tokenizer of BLIP-base; 12 heads and a vocabulary of 30,524 as published."""
    folder = tmp_path_factory.mktemp("blip-base")
    text = {"vocab_size": 30_524, "hidden_size": 768, "encoder_hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12}  # fmt: skip
    BlipConfig(text_config=text, vision_config={"image_size": 384, "patch_size": 16}).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])}
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def sizes(blip_base, name, *changes):
    recipe = recipes.load(ROOT / "recipes" / f"{name}.yaml", [f"backbone.model={blip_base}", *changes])
    backbone = resolve.make_backbone(recipes.components(recipe).backbone, recipe.engine, None)
    method, config = resolve.make_method(recipes.components(recipe).method)
    resolve.check_sites(recipes.components(recipe).method, backbone, method, config)
    with torch.device("meta"):
        parts = resolve.Resolved(recipe, {}, backbone, method, config, [], [], None, None)
        model = resolve.attach(parts, backbone.build(on_meta=True))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert method.kinds(list(trained))["peft"] == list(trained)
    return trained, sum(p.numel() for p in model.parameters()) - sum(trained.values())


@pytest.mark.parametrize("name", ["p_adapter_blip_vqav2", "p_adapter_blip_snli_ve", "p_adapter_blip_coco"])
def test_the_published_count_comes_out_of_the_shipped_recipes(blip_base, name):
    trained, frozen = sizes(blip_base, name)
    assert sum(trained.values()) == 12 * (2 * ATTENTION + FFN) == 7_111_344
    assert not any("vision_model" in n for n in trained)
    # the published total has positions for the smaller image that the recipe resizes to
    smaller = 768 * ((384 // 16) ** 2 - (224 // 16) ** 2)
    assert frozen - smaller == 223_679_804


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ("method.sublayers=[self]", 12 * ATTENTION),
        ("method.sublayers=[ffn]", 12 * FFN),
        ("method.learnable_p=false", 7_111_344 - 24),
        ("method.r=16", 12 * (2 * (3 * 768 * 48 + 2 * 48 + 768 + 2) + FFN)),
    ],
)
def test_the_count_follows_the_recipe(blip_base, change, count):
    assert sum(sizes(blip_base, "p_adapter_blip_vqav2", change)[0].values()) == count
