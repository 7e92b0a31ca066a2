"""Routed LoRA: outputs against the equations, and which parameters train."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmpeft_ds import RoutedLoraConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.route import ROUTES, route
from mmpeft_ds.sites.condition import Condition, conditioned, enable_checkpointing
from tests.helpers.models.tiny_stock import IDS, D, bert, fill, gpt2, grads, image, output, wrap

ROUTED = [k for k in ROUTES if k != "none"]
VARIANTS = ["plain", "after_up", "split", "split_merge", "split_merge_ln"]
BUILD = {"bert": bert, "roberta": lambda: bert(roberta=True), "gpt2": gpt2}


def options_for(kind, name="bert"):
    """`xtxt` leaks in a causal tower and is refused there unless parity is asked for."""
    return {"route": kind, "reshape_compat": kind == "xtxt" and name == "gpt2"}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("kind", ROUTES)
def test_it_starts_as_the_frozen_model(name, kind):
    model = BUILD[name]()
    before = output(model)
    wrapped = wrap(model, filled=False, train_bias=True, train_norms=True, **options_for(kind, name))
    assert torch.equal(output(wrapped), before)
    downs = [p for n, p in wrapped.named_parameters() if n.endswith(".A")]
    assert downs and all(p.std() > 0 for p in downs), "`down` must not be zero, or nothing would ever train"
    assert not torch.equal(output(fill(wrapped)), before)


@pytest.mark.parametrize("kind", ROUTES)
def test_a_separate_projection_computes_the_equation(kind):
    wrapped = wrap(bert().double(), train_bias=True, **options_for(kind))
    layer = wrapped.get_base_model().encoder.layer[0].attention.self.query
    base, own = layer.base_layer, layer.routed_lora["default"]
    x, y = torch.randn(2, 5, D, dtype=torch.float64), image().double()
    with conditioned(Condition(y)):
        got = layer(x)
    want = x @ base.weight.T + own.bias + 2.0 * route(kind, x @ own.A.T, y @ own.A.T) @ own.B.T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("kind", ["mul", "matmul1", "matmul2"])
@pytest.mark.parametrize("targets", [["q", "v"], ["v"], ["q", "k", "v"]])
def test_a_fused_projection_computes_the_equation(kind, targets, coupled):
    wrapped = wrap(gpt2().double(), route=kind, targets=targets, coupled=coupled)
    layer = wrapped.get_base_model().transformer.h[0].attn.c_attn
    base, own = layer.base_layer, layer.routed_lora["default"]
    x, y = torch.randn(2, 5, D, dtype=torch.float64), image().double()
    with conditioned(Condition(y)):
        got = layer(x)
    h, v = (t @ own.A.T for t in (x, y))
    parts = [slice(4 * i, 4 * i + 4) for i in range(len(targets))]
    z = route(kind, h, v) if coupled else torch.cat([route(kind, h[..., p], v[..., p]) for p in parts], -1)
    want = x @ base.weight + base.bias
    for i, target in enumerate(targets):
        at = D * "qkv".index(target)
        want[..., at : at + D] += 2.0 * z[..., parts[i]] @ own.B[D * i : D * (i + 1)].T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradients_agree_with_finite_differences(variant, name):
    wrapped = wrap(BUILD[name]().double(), variant=variant, route="matmul1", train_bias=True, layers=[0])
    base = wrapped.get_base_model()
    layer = base.encoder.layer[0].attention.self.value if name == "bert" else base.transformer.h[0].attn.c_attn
    parameters = dict(layer.routed_lora["default"].named_parameters())
    x, y = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True), image(1).double().requires_grad_()

    def run(x, y, *values):
        with conditioned(Condition(y)):
            return torch.func.functional_call(
                layer, {f"routed_lora.default.{k}": v for k, v in zip(parameters, values, strict=True)}, (x,)
            )

    assert torch.autograd.gradcheck(run, (x, y, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("kind", ROUTED)
def test_the_image_gets_gradient_and_every_trainable_does(name, kind):
    wrapped = wrap(BUILD[name](), train_bias=True, train_norms=True, **options_for(kind, name))
    y = image(requires_grad=True)
    output(wrapped, y).square().sum().backward()
    assert y.grad.abs().max() > 0
    unused = {n for n, g in grads(wrapped).items() if g is None}
    assert not unused
    assert all(p.grad is None for p in wrapped.parameters() if not p.requires_grad)


def test_the_gradient_of_down_includes_the_image_path():
    wrapped = wrap(bert(), route="mul", layers=[0])
    layer = wrapped.get_base_model().encoder.layer[0].attention.self.query
    own, x, y = layer.routed_lora["default"], torch.randn(2, 5, D), image()
    with conditioned(Condition(y)):
        layer(x).square().sum().backward()
    whole = own.A.grad.clone()
    out = layer.base_layer(x).detach() + F.linear(F.linear(x, own.A) * F.linear(y, own.A).detach() * 2.0, own.B)
    (text_only,) = torch.autograd.grad(out.square().sum(), own.A)
    assert (whole - text_only).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [k for k in ROUTES if k != "xtxt"])
def test_a_later_token_never_changes_an_earlier_one(kind):
    wrapped = wrap(gpt2(), route=kind)
    later = IDS.clone()
    later[:, 3:] += 1
    torch.testing.assert_close(output(wrapped, ids=later)[:, :3], output(wrapped)[:, :3], rtol=0, atol=0)


def test_xtxt_in_a_causal_tower_is_refused_and_really_leaks():
    with pytest.raises(BadInput, match="future"):
        wrap(gpt2(), route="xtxt")
    wrapped = wrap(gpt2(), route="xtxt", reshape_compat=True)
    later = IDS.clone()
    later[:, 3:] += 1
    assert (output(wrapped, ids=later)[:, :3] - output(wrapped)[:, :3]).abs().max() > 1e-4


def test_cached_decoding_equals_the_full_forward():
    wrapped = wrap(gpt2(), route="matmul1")
    full = output(wrapped)
    with conditioned(Condition(image())):
        first = wrapped(IDS[:, :3], use_cache=True)
        rest = wrapped(IDS[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first[0], rest[0]], 1), full, rtol=1e-5, atol=1e-5)


def test_beams_see_the_image_of_their_own_row():
    wrapped = wrap(gpt2(), route="mul")
    beams = IDS.repeat_interleave(3, 0)
    expanded = output(wrapped, image(), beams)
    torch.testing.assert_close(expanded, output(wrapped).repeat_interleave(3, 0), rtol=0, atol=1e-6)
    with conditioned(Condition(image())):
        wrapped.generate(input_ids=IDS, num_beams=2, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="no multiple"):
        output(wrapped, image(2), IDS[:1])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_activation_checkpointing_changes_nothing(name):
    def step(checkpointed):
        wrapped = wrap(BUILD[name](), route="matmul1", train_bias=True, train_norms=True)
        y = image(requires_grad=True)
        if checkpointed:
            enable_checkpointing(wrapped.get_base_model())
        wrapped.train()
        # Two forwards under two conditions before one backward.
        loss = output(wrapped, y).square().sum() + 2 * output(wrapped, 3 * y).square().sum()
        loss.backward()
        return loss.detach(), {**grads(wrapped), "y": y.grad}

    plain, again = step(False), step(True)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_stock_checkpointing_loses_the_condition_and_says_how_to_mend_it():
    wrapped = wrap(bert(), train_norms=True)
    wrapped.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.train()
    with pytest.raises(BadInput, match="enable_checkpointing"):
        output(wrapped, image(requires_grad=True)).sum().backward()


def test_reentrant_checkpointing_is_refused_when_the_image_needs_gradient():
    wrapped = wrap(bert())
    enable_checkpointing(wrapped.get_base_model(), use_reentrant=True)
    wrapped.train()
    with pytest.raises(ValueError, match="reentrant"):
        output(wrapped, image(requires_grad=True))


def test_text_and_image_drop_out_by_independent_masks():
    wrapped = wrap(bert().double(), route="add", dropout=0.5, layers=[0]).train()
    layer = wrapped.get_base_model().encoder.layer[0].attention.self.query
    own = layer.routed_lora["default"]
    with torch.no_grad():
        own.A.copy_(torch.eye(4, D))
        own.B.copy_(torch.eye(D, 4))
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
    ones = torch.ones(400, 1, D, dtype=torch.float64)
    with conditioned(Condition(ones)):
        sums = layer(ones)[:, 0, :4] / 4  # two dropped inputs, each 0 or 2, times alpha / r = 2
    shares = [(sums == value).double().mean().item() for value in (0, 1, 2)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.06), "one mask for both would give half 0, half 2"
    wrapped.eval()
    with conditioned(Condition(ones)):
        assert torch.equal(layer(ones), layer(ones))


@pytest.mark.parametrize("kind", ["none", "mul"])
def test_a_bfloat16_base_has_float32_trainables_and_bfloat16_activations(kind):
    model = bert().to(torch.bfloat16)
    wrapped = wrap(model, route=kind, train_bias=True, train_norms=True, modules_to_save=["pooler"])
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    wrapped.add_adapter("second", RoutedLoraConfig(route=kind, train_norms=True, modules_to_save=["pooler"]))
    assert {p.dtype for n, p in wrapped.named_parameters() if ".second." in n} == {torch.float32}
    out = output(wrapped)
    assert out.dtype == torch.bfloat16
    with conditioned(Condition(image())):
        assert wrapped(IDS).pooler_output.dtype == torch.float32
    exact = wrap(bert().to(torch.bfloat16).float(), route=kind, train_bias=True, train_norms=True)
    # the same weights in float32: bfloat16 activations stay within a few of their steps
    torch.testing.assert_close(out.float(), output(exact), rtol=0.1, atol=0.1)


class Seen(nn.Module):
    """Records what an inner projection gets."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.inputs = inner, []

    def forward(self, x, y, mask, bias):
        self.inputs.append(y)
        return self.inner(x, y, mask, bias)


@pytest.mark.parametrize(("pool", "m"), [("all", 3), ("mean", 1), ("first", 1)])
def test_a_given_condition_is_pooled_as_asked(pool, m):
    wrapped = wrap(bert(), route="matmul1", pool=pool, layers=[1])
    layer = wrapped.get_base_model().encoder.layer[1].attention.self.query
    layer.routed_lora["default"].has_bias = False
    spy = Seen(layer.routed_lora["default"])
    spy.has_bias = False
    layer.routed_lora["default"] = spy
    y, mask = image(m=3), torch.tensor([[True, False, True]] * 2)
    with conditioned(Condition(y, mask)):
        wrapped(IDS)
    got = spy.inputs[0]
    assert got.shape == (2, m, D)
    want = {"all": y, "mean": (y[:, [0]] + y[:, [2]]) / 2, "first": y[:, :1]}[pool]
    torch.testing.assert_close(got, want)


def test_own_input_and_encoder_states_as_conditions():
    own = wrap(bert(), route="matmul1", condition="self")
    assert own(IDS)[0].shape == (2, 5, D), "needs no published condition"
    decoder = wrap(bert(is_decoder=True, add_cross_attention=True), route="matmul1", condition="cross_mean")
    names = [n for n, p in decoder.named_parameters() if p.requires_grad]
    assert names and all("crossattention" in n for n in names)
    states = torch.randn(2, 7, D)
    with pytest.raises(BadInput, match="encoder states"):
        decoder(IDS, encoder_hidden_states=states)
    with conditioned(Condition(encoder=states)):
        decoder(IDS, encoder_hidden_states=states)
    with pytest.raises(BadInput, match="cross-attention"):
        wrap(bert(), condition="cross")
