"""Routed LoRA on several towers, and the biases of every layer that a pattern names."""

import copy

import peft
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from mmpeft_ds import RoutedLoraConfig, methods
from mmpeft_ds.errors import BadInput

IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 4, 2, 1]])


@pytest.fixture(scope="module")
def bart():
    torch.manual_seed(0)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0, max_position_embeddings=16)
    sizes = dict(vocab_size=23, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrap(model, adapter="default", moved=True, **options):
    config = RoutedLoraConfig(**{"r": 2, "route": "none", "tower": ["text"], "targets": ["q", "v"], **options})
    if isinstance(model, peft.PeftModel):
        model.add_adapter(adapter, config)
    else:
        model = peft.get_peft_model(copy.deepcopy(model), config, adapter)
    if moved:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f".{adapter}." in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def trained(model):
    return {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}


def layers(model):
    return {n.split(".routed_lora")[0] for n in trained(model)}


@torch.no_grad()
def output(model):
    return model(input_ids=IDS, attention_mask=(IDS != 1).long(), decoder_input_ids=IDS).logits


def test_a_list_takes_every_tower_that_it_names(bart):
    both, decoder = (layers(wrap(bart, tower=t)) for t in (["text"], "model.decoder"))
    assert len(both) == 2 * (2 + 4) and decoder == {p for p in both if p.startswith("model.decoder")}
    assert layers(wrap(bart, tower=["model.decoder", "model.encoder"])) == both
    with pytest.raises(BadInput, match="several towers fit.*or give a list"):
        wrap(bart, tower=None)
    with pytest.raises(BadInput, match="no tower 'image'"):
        wrap(bart, tower=["text", "image"])


def test_all_biases_of_a_pattern_train_and_nothing_else_of_those_layers(bart):
    model = wrap(bart, train_bias=["model.*"], moved=False)
    names = {n for n, p in bart.named_parameters() if n.endswith("bias")}
    kinds = methods.get("routed_lora").kinds(list(trained(model)))
    found = {n.split(".routed_lora")[0] + ".bias" for n in kinds["bias"]}
    assert found == names and not kinds["norm"] and not kinds["head"]
    assert sum(trained(model)[n].numel() for n in kinds["bias"]) == sum(
        p.numel() for n, p in bart.named_parameters() if n in names
    )
    assert torch.equal(output(model), output(bart))
    for name in kinds["bias"]:
        frozen = bart.get_parameter(name.split(".routed_lora")[0] + ".bias")
        assert torch.equal(trained(model)[name], frozen)


def test_trained_biases_do_what_biases_do(bart):
    model = wrap(bart, train_bias=["model.decoder.*"], moved=False)
    by_hand = copy.deepcopy(bart)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
                by_hand.get_parameter(name.split(".routed_lora")[0] + ".bias").copy_(parameter)
    torch.testing.assert_close(output(model), output(by_hand), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(output(model), output(bart))
    assert not any(n.startswith("model.encoder") for n in trained(model) if n.endswith("bias"))


def test_merging_folds_biases_and_unmerging_restores_the_bits(bart):
    model = wrap(bart, train_bias=["model.*"])
    before = output(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model), before, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), output(bart))


def test_the_directory_holds_every_bias_and_two_adapters_keep_apart(bart, tmp_path):
    model = wrap(bart, "first", train_bias=["model.*"], train_norms=["*layernorm_embedding"])
    first = output(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(bart), tmp_path / "first").eval()
    assert torch.equal(output(again), first)
    wrap(model, "second", train_bias=["model.*"], train_norms=["*layernorm_embedding"], r=4)
    model.set_adapter("second")
    second = output(model)
    model.set_adapter("first")
    assert torch.equal(output(model), first) and not torch.equal(second, first)


def test_a_second_adapter_of_another_shape_and_a_pattern_of_nothing_are_refused(bart):
    model = wrap(bart, "first", train_bias=["model.*"])
    with pytest.raises(BadInput, match="earlier adapter of this model is a TrainedBias here"):
        wrap(model, "second", targets=["k"])
    with pytest.raises(BadInput, match="train_bias: 'nothing' matches no"):
        wrap(bart, train_bias=["nothing"])
