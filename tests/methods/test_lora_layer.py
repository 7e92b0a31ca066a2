"""LoRA layers compute a Linear and its term by one function where that is plain arithmetic, and else as peft does."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from mmpeft_ds.methods.lora import layer


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def models(**options):
    """Of peft, and the same with our layers; the term is not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"], init_lora_weights=False, **options)
    plain = peft.get_peft_model(Tower(), config)
    ours = copy.deepcopy(plain)
    layer.use_one_function(ours)
    return plain, ours


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the inputs that the one function was called with."""
    seen = []

    def counted(x, *args):
        seen.append(tuple(x.shape))
        return real(x, *args)

    real = layer.low_rank_linear
    monkeypatch.setattr(layer, "low_rank_linear", counted)
    return seen


def same(plain, ours, x):
    """Compare outputs and the gradients of all trained parameters."""
    results = []
    for model in (plain, ours):
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_outputs_and_gradients_are_those_of_peft(calls):
    plain, ours = models()
    same(plain, ours, torch.randn(4, 5, 6))
    assert calls == [(4, 5, 6), (4, 5, 8)]
    assert isinstance(ours.base_model.model.fc1, peft.tuners.lora.Linear)
    assert ours.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}])
def test_another_arithmetic_is_left_to_peft(calls, options):
    plain, ours = models(**options)
    same(plain, ours, torch.randn(4, 6))
    assert not calls


def test_dropout_is_applied_while_training_and_not_in_evaluation(calls):
    plain, ours = models(lora_dropout=0.5)
    x, outputs = torch.randn(4, 6), []
    for model in (plain.train(), ours.train()):
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    assert not calls
    same(plain.eval(), ours.eval(), x)
    assert len(calls) == 2


def test_merged_and_disabled_adapters_run_the_base_alone(calls):
    plain, ours = models()
    x = torch.randn(4, 6)
    with ours.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(ours(x), plain(x))
    before = ours(x).detach()
    assert len(calls) == 2  # with a gradient
    ours.merge_adapter()
    torch.testing.assert_close(ours(x).detach(), before)
    assert len(calls) == 2


def test_two_active_adapters_are_added_by_peft(calls):
    plain, ours = models()
    for model in (plain, ours):
        torch.manual_seed(2)
        model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "more"])
    same(plain, ours, torch.randn(4, 6))
    assert not calls


def test_without_a_gradient_outputs_are_those_of_peft_to_the_bit(calls):
    plain, ours = models()
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    assert not calls


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_a_hook_on_a_part_is_called(calls, part):
    """As those by which ZeRO-3 gathers a weight."""
    _, ours = models()
    seen = []
    ours.base_model.model.fc1.get_submodule(part).register_forward_pre_hook(lambda *_: seen.append(part))
    ours(torch.randn(4, 6))
    assert seen == [part] and len(calls) == 1


def test_factors_of_another_dtype_are_left_to_peft(calls):
    plain, ours = (model.to(torch.bfloat16) for model in models())
    for model in (plain, ours):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x), plain(x))
    assert not calls
