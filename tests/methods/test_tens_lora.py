"""TensLoRA: which projections share a tensor, how large it is, what it adds, and that it merges."""

import peft
import pytest
import torch
from transformers import ViTConfig, ViTModel

from mmpeft_ds import TensLoraConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.tens_lora.layer import TensLoraLinear
from tests.helpers.models.tiny_zoo import ZOO, output


def attach(kind="bert", moved=True, **options):
    torch.manual_seed(3)
    model = peft.get_peft_model(ZOO[kind].build(), TensLoraConfig(**({"r": 3} | options)))
    if moved:
        with torch.no_grad():
            for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model.eval()


def tensors(model):
    """Shapes of what each tensor of the adapter is made of."""
    return [
        ([tuple(f.shape) for f in held.factors], held.core is not None and tuple(held.core.shape))
        for m in model.modules()
        if isinstance(m, TensLoraLinear)
        for own in m.tens_lora_shared.values()
        for held in own
    ]


@pytest.mark.parametrize(
    ("modes", "beside"),
    [
        (["projections", "layers"], (3 * 8, 12 * 8, 8**4)),
        (["layers"], (3 * 12 * 8, 3 * 8**3)),
        (["projections"], (12 * 3 * 8, 12 * 8**3)),
        (["heads", "projections", "layers"], (12 * 8, 3 * 8, 12 * 8, 8**5)),
    ],
)
def test_vit_base_gets_the_published_number_of_parameters(modes, beside):
    with torch.device("meta"):
        model = peft.get_peft_model(ViTModel(ViTConfig()), TensLoraConfig(r=8, modes=modes))
    groups = (1 if "projections" in modes else 3) * (1 if "layers" in modes else 12)
    wide = 768 + (64 if "heads" in modes else 768)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == groups * wide * 8 + sum(beside)


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize("start", ["orthogonal", "kaiming_uniform", "normal"])
def test_it_starts_as_the_frozen_model_and_the_first_gradient_is_not_zero(form, start):
    model = attach(moved=False, form=form, start=start)
    tiny = ZOO["bert"]
    assert torch.equal(output(model, tiny), output(tiny.build(), tiny))
    output(model, tiny).square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_all_layers_and_projections_share_one_tensor_and_all_of_it_learns():
    model = attach()
    (factors, core), *others = tensors(model)
    layers = ZOO["bert"].build().config.num_hidden_layers
    assert not others and [n for n, _ in factors[2:]] == [3, layers] and core == (3,) * 4
    output(model, ZOO["bert"]).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


class KeepsFloat32(torch.nn.Linear):
    """A layer that answers in the dtype of its input also under autocast, as 4-bit layers of bitsandbytes do."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


def test_gradients_come_back_from_a_layer_that_keeps_float32_under_autocast():
    model, tiny = attach(), ZOO["bert"]
    output(model, tiny).square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = {name: p.grad for name, p in trained.items()}
    model.zero_grad()
    for layer in model.modules():
        if isinstance(layer, TensLoraLinear):
            layer.base_layer.__class__ = KeepsFloat32
    with torch.autocast("cpu", torch.bfloat16):
        loss = output(model, tiny).square().mean()
    loss.backward()
    for name, p in trained.items():
        assert (p.grad - plain[name]).norm() < 0.1 * plain[name].norm(), name


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("options", [{}, {"modes": ["heads", "layers"]}, {"form": "cp"}, {"r": [4, 3, 2, 2]}], ids=str)
def test_merged_it_computes_the_same_and_unmerged_the_frozen_weights_are_back(kind, options):
    tiny, model = ZOO[kind], attach(kind, **options)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        apart = output(model, tiny)
        model.merge_adapter()
        assert torch.allclose(output(model, tiny), apart, atol=1e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(output(model, tiny), output(tiny.build(), tiny))
    assert not torch.allclose(apart, output(tiny.build(), tiny), atol=1e-3)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_each_head_gets_its_row_of_the_factor_of_heads():
    model = attach("bert", modes=["heads"], targets=["q"])
    layer = next(m for m in model.modules() if isinstance(m, TensLoraLinear))
    (held,) = layer.tens_lora_shared["default"]
    heads = held.factors[2].shape[0]
    with torch.no_grad():
        held.factors[2][1:] = 0  # the first head alone
    (change,) = layer.tens_lora["default"].weights()
    first, *rest = change.chunk(heads)
    assert first.any() and not any(part.any() for part in rest)


def test_keys_narrower_than_queries_have_a_tensor_of_their_own():
    config = ZOO["llama"].build().config
    assert config.num_key_value_heads < config.num_attention_heads
    width, narrow = config.hidden_size, config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    found = {tuple(n for n, _ in factors) for factors, _ in tensors(attach("llama"))}
    assert found == {(width, width, 1, config.num_hidden_layers), (width, narrow, 2, config.num_hidden_layers)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "cp", "r": [2, 2, 2, 2]}, "one rank"),
        ({"r": [2, 2]}, "4 ranks: input, output, projections, layers"),
        ({"r": 0}, "1 or more"),
        ({"modes": []}, "modes"),
        ({"modes": ["width"]}, "modes"),
        ({"layers": [99]}, "layers"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_in_one_line(options, words):
    with pytest.raises(BadInput, match=words) as error:
        attach(**options)
    assert "\n" not in str(error.value)
