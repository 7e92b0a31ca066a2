"""Trainable parameters of Aurora on BLIP-base, on the meta device, as the shipped recipes train it."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BlipConfig, PreTrainedTokenizerFast

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.assembly import resolve
from tests.helpers import ROOT

HEADS = 768 * 256 + 256 + 768 * 2 + 2  # vision_proj and itm_head
# rank -> factors, modes of the image tower, of a text tower (self and cross), gates of a text tower
PARTS = {
    32: (81_920, 4_608, 2_304, 36_864),
    64: (360_448, 9_216, 4_608, 36_864),
    128: (2_293_760, 18_432, 9_216, 36_864),
}


@pytest.fixture(scope="module")
def blip_base(tmp_path_factory):
    """Configuration and a tokenizer of BLIP-base as published."""
    folder = tmp_path_factory.mktemp("blip-base")
    text = {"vocab_size": 30_524, "hidden_size": 768, "encoder_hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12}  # fmt: skip
    vision = {"image_size": 384, "patch_size": 16}
    BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=256).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])}
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def trained(blip_base, name, *changes):
    """Size of every trained parameter, and the names by kind."""
    recipe = recipes.load(ROOT / "recipes" / f"{name}.yaml", [f"backbone.model={blip_base}", *changes])
    backbone = resolve.make_backbone(recipes.components(recipe).backbone, recipe.engine, None)
    method, config = resolve.make_method(recipes.components(recipe).method)
    resolve.check_sites(recipes.components(recipe).method, backbone, method, config)
    with torch.device("meta"):
        parts = resolve.Resolved(recipe, {}, backbone, method, config, [], [], None, None)
        model = resolve.attach(parts, backbone.build(on_meta=True))
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    return sizes, method.kinds(list(sizes))


def by_part(sizes, names):
    """Factors, modes of the image tower, modes of text towers, gates."""
    groups = {"shared": 0, "image": 0, "text": 0, "gates": 0}
    for name in names:
        part = "shared" if "aurora_shared" in name else "gates" if "aurora_gates" in name else None
        groups[part or ("image" if "vision_model" in name else "text")] += sizes[name]
    return tuple(groups.values())


@pytest.mark.parametrize(("rank", "total"), [(32, 164_864), (64, 452_608), (128, 2_404_352)])
def test_the_published_counts_of_question_answering(blip_base, rank, total):
    sizes, kinds = trained(blip_base, "aurora_vqav2", f"method.r={rank}")
    shared, image, text, gates = PARTS[rank]
    assert by_part(sizes, kinds["peft"]) == (shared, image, 2 * text, 2 * gates), "encoder and decoder"
    assert sum(sizes.values()) == total
    assert not kinds["head"]


@pytest.mark.parametrize(("rank", "total"), [(32, 125_696), (64, 411_136), (128, 2_358_272)])
def test_the_published_counts_of_retrieval(blip_base, rank, total):
    sizes, kinds = trained(blip_base, "aurora_flickr30k", f"method.r={rank}")
    assert by_part(sizes, kinds["peft"]) == PARTS[rank]
    assert sum(sizes[n] for n in kinds["peft"]) == total
    assert sum(sizes[n] for n in kinds["head"]) == HEADS
    assert sum(sizes.values()) == total + HEADS == {32: 324_098, 64: 609_538, 128: 2_556_674}[rank]
    assert not any("text_proj" in n for n in sizes)


def test_the_cp_form_is_what_the_advertised_size_needs(blip_base):
    """Factors, 216 modes and a core of r numbers: 0.05% of the base at rank 64; gates and heads come on top."""
    sizes, kinds = trained(blip_base, "aurora_flickr30k", "method.r=64", "method.form=cp", "method.gates=false")
    assert sum(sizes[n] for n in kinds["peft"]) == 2 * 768 * 64 + 216 * 64 + 64 == 112_192
