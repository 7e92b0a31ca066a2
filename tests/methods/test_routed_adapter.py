"""Routed adapters: outputs, places in the model, shared weights, and refusals."""

import copy
from typing import get_args, get_type_hints

import peft
import pytest
import torch
from torch.nn import functional as F

from mmpeft_ds import RoutedAdapterConfig, RoutedLoraConfig, methods
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.bottleneck_attention import bottleneck_attention
from mmpeft_ds.ops.route import ROUTES, route
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.condition import Condition, conditioned, enable_checkpointing
from tests.helpers.models.tiny_stock import IDS, D, bert, fill, gpt2, image, output

BUILD = {"bert": bert, "roberta": lambda: bert(roberta=True), "gpt2": gpt2}
VARIANTS = get_args(get_type_hints(RoutedAdapterConfig)["variant"])
ENDS = {
    "bert": ("encoder.layer.0.attention.output.dropout", "encoder.layer.0.output.dropout"),
    "gpt2": ("transformer.h.0.attn.resid_dropout", "transformer.h.0.mlp.dropout"),
}


def wrap(model, filled=True, **options):
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, RoutedAdapterConfig(**{"r": 4, **options}))
    return fill(wrapped) if filled else wrapped


def ends(wrapped, name):
    return [wrapped.get_base_model().get_submodule(path) for path in ENDS[name]]


def options_for(kind, name):
    return {"route": kind, "reshape_compat": kind == "xtxt" and name == "gpt2"}


@pytest.mark.parametrize("residual", [None, True, False])
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", ROUTES)
def test_it_computes_the_equation_with_the_backbones_non_linearity(kind, name, residual):
    wrapped = wrap(BUILD[name]().double(), residual=residual, **options_for(kind, name))
    layer = ends(wrapped, name)[0]
    own = layer.routed_adapter["default"]
    x, y = torch.randn(2, 5, D, dtype=torch.float64), image().double()
    with conditioned(Condition(y)):
        got = layer(x)
    compat = {"reshape_compat": True} if kind == "xtxt" and name == "gpt2" else {}
    z = route(kind, x @ own.A.T + own.down_bias, y @ own.A.T + own.down_bias, **compat)
    act = F.gelu(z) if name == "bert" else F.gelu(z, approximate="tanh")
    want = act @ own.B.T + own.up_bias
    inside = name == "gpt2" if residual is None else residual
    torch.testing.assert_close(got, want + x if inside else want, rtol=0, atol=1e-12)


def test_another_non_linearity_can_be_named():
    wrapped = wrap(bert().double(), route="none", activation="relu")
    layer = ends(wrapped, "bert")[0]
    own, x = layer.routed_adapter["default"], torch.randn(1, 3, D, dtype=torch.float64)
    want = F.relu(x @ own.A.T + own.down_bias) @ own.B.T + own.up_bias
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)


def test_an_encoder_has_two_adapters_a_layer_and_a_decoder_one_used_twice():
    def paths(wrapped):
        return {n.split(".routed_adapter")[0] for n, p in wrapped.named_parameters() if p.requires_grad}

    assert len(paths(wrap(bert()))) == 4 and len(paths(wrap(gpt2()))) == 2
    assert len(paths(wrap(bert(), shared=True))) == 2 and len(paths(wrap(gpt2(), shared=False))) == 4
    assert len(paths(wrap(bert(), after=["ffn"], layers=[1]))) == 1
    shared = wrap(gpt2())
    first, second = ends(shared, "gpt2")
    assert second.owners["default"] is first and not len(second.routed_adapter)


def test_a_shared_adapter_gets_the_gradients_of_both_places():
    def gradients(model, shared):
        wrapped = wrap(model.double(), filled=False, shared=shared, layers=[0])
        first, second = (end.owners["default"].routed_adapter["default"] for end in ends(wrapped, "gpt2"))
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        second.load_state_dict(first.state_dict())
        output(wrapped).square().sum().backward()
        return [[p.grad for p in own.parameters()] for own in (first, second)]

    apart, together = gradients(gpt2(), False), gradients(gpt2(), True)
    for one, other, both in zip(*apart, together[0], strict=True):
        torch.testing.assert_close(one + other, both, rtol=1e-9, atol=1e-9)


def test_a_copied_model_shares_within_the_copy():
    wrapped = wrap(gpt2())
    twin = copy.deepcopy(wrapped)
    assert torch.equal(output(twin), output(wrapped))
    first, second = ends(twin, "gpt2")
    assert second.owners["default"] is first
    with torch.no_grad():
        first.routed_adapter["default"].B.zero_()
    assert not torch.equal(output(twin), output(wrapped))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ENDS)
def test_gradients_agree_with_finite_differences(variant, name):
    wrapped = wrap(BUILD[name]().double(), variant=variant, r=16, route="matmul1", layers=[0])
    layer = ends(wrapped, name)[0]
    parameters = dict(layer.routed_adapter["default"].named_parameters())
    x, y = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True), image(1, 3).double().requires_grad_()

    def run(x, y, *values):
        given = {f"routed_adapter.default.{k}": v for k, v in zip(parameters, values, strict=True)}
        with conditioned(Condition(y)):
            return torch.func.functional_call(layer, given, (x,))

    assert torch.autograd.gradcheck(run, (x, y, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("kind", [k for k in ROUTES if k != "none"])
def test_the_image_gets_gradient_and_every_trainable_does(name, kind):
    wrapped = wrap(BUILD[name](), train_norms=True, **options_for(kind, name))
    y = image(requires_grad=True)
    output(wrapped, y).square().sum().backward()
    assert y.grad.abs().max() > 0
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    assert all(p.grad is None for p in wrapped.parameters() if not p.requires_grad)


def test_the_gradient_of_down_includes_the_image_path():
    wrapped = wrap(bert(), route="mul", layers=[0])
    layer = ends(wrapped, "bert")[0]
    own, x, y = layer.routed_adapter["default"], torch.randn(2, 5, D), image()
    with conditioned(Condition(y)):
        layer(x).square().sum().backward()
    v = (y @ own.A.T + own.down_bias).detach()
    out = F.linear(F.gelu(F.linear(x, own.A, own.down_bias) * v), own.B, own.up_bias)
    (text_only,) = torch.autograd.grad(out.square().sum(), own.A)
    assert (own.A.grad - text_only).abs().max() > 1e-3


def test_both_projections_start_normal_with_deviation_0_02_and_zero_biases():
    wrapped = wrap(bert(), filled=False, r=400)
    own = ends(wrapped, "bert")[0].routed_adapter["default"]
    for weight in (own.A, own.B):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not own.down_bias.any() and not own.up_bias.any()


@pytest.mark.parametrize("kind", [k for k in ROUTES if k != "xtxt"])
def test_a_later_token_never_changes_an_earlier_one(kind):
    wrapped = wrap(gpt2(), route=kind)
    later = IDS.clone()
    later[:, 3:] += 1
    torch.testing.assert_close(output(wrapped, ids=later)[:, :3], output(wrapped)[:, :3], rtol=0, atol=0)


def test_cached_decoding_equals_the_full_forward():
    wrapped = wrap(gpt2(), route="matmul1")
    full = output(wrapped)
    with conditioned(Condition(image())):
        first = wrapped(IDS[:, :3], use_cache=True)
        rest = wrapped(IDS[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first[0], rest[0]], 1), full, rtol=1e-5, atol=1e-5)
    beams = output(wrapped, image(), IDS.repeat_interleave(3, 0))
    torch.testing.assert_close(beams, full.repeat_interleave(3, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_activation_checkpointing_changes_nothing(name, reentrant):
    def step(checkpointed):
        wrapped = wrap(BUILD[name](), route="matmul1", train_norms=True)
        if checkpointed:
            wrapped.get_base_model().get_input_embeddings().weight.requires_grad_(reentrant)
            enable_checkpointing(wrapped.get_base_model(), use_reentrant=reentrant)
        wrapped.train()
        # two forwards under two conditions before one backward
        (output(wrapped).square().sum() + 2 * output(wrapped, 3 * image()).square().sum()).backward()
        own = ("routed_adapter", "routed_adapter_norm")
        return {n: p.grad for n, p in wrapped.named_parameters() if any(f".{k}." in n for k in own)}

    torch.testing.assert_close(step(True), step(False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("route", ["matmul1", "add", "mul", "ones"])
def test_padded_condition_tokens_count_for_nothing_although_down_has_a_bias(route):
    wrapped = wrap(bert(), route=route)
    y = image(m=5)
    keep = torch.zeros(2, 5, dtype=torch.bool)
    keep[:, :3] = True
    other = y.clone()
    other[:, 3:] = 7.0

    def said(y, mask):
        with conditioned(Condition(y, mask)):
            return wrapped(IDS)[0]

    assert torch.equal(said(y, keep), said(other, keep))
    if route in ("matmul1", "ones"):
        torch.testing.assert_close(said(y, keep), said(y[:, :3], None), rtol=0, atol=1e-6)
        assert (said(y, None) - said(y, keep)).abs().max() > 1e-3


@pytest.mark.parametrize("method", [RoutedLoraConfig, RoutedAdapterConfig])
def test_cross_attention_in_the_bottleneck_heeds_the_mask_and_the_text_only_where_there_is_a_choice(method):
    torch.manual_seed(0)
    wrapped = fill(peft.get_peft_model(bert(), method(r=16, variant="cross_attention", route="none")))
    y, keep = image(m=4), torch.tensor([[True, True, False, False]] * 2)

    def said(y, mask=None):
        with conditioned(Condition(y, mask)):
            return wrapped(IDS)[0]

    torch.testing.assert_close(said(y, keep), said(y[:, :2]), rtol=0, atol=1e-6)
    assert (said(y) - said(y[:, :2])).abs().max() > 1e-4
    assert said(y, torch.zeros(2, 4, dtype=torch.bool)).isfinite().all()


def test_with_one_condition_token_cross_attention_ignores_the_question():
    weights = tuple(torch.randn(8, 8) for _ in range(4))
    h, i = torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    want = (i @ weights[2].T @ weights[3].T).expand(2, 5, 8)
    torch.testing.assert_close(bottleneck_attention(h, i, weights, 4), want)
    many = torch.randn(2, 3, 8)
    assert (bottleneck_attention(h, many, weights, 4) - bottleneck_attention(-h, many, weights, 4)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="do not divide"):
        bottleneck_attention(h, i, weights, 3)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_verbs_of_peft(name, variant, tmp_path):
    model = BUILD[name]()
    before = output(model)
    wrapped = wrap(model, r=16, variant=variant, train_norms=True)
    changed = output(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped), before)
    wrapped.save_pretrained(tmp_path)
    # trainable, since torch multiplies frozen weights in another order
    again = peft.PeftModel.from_pretrained(BUILD[name](), tmp_path, is_trainable=True)
    assert torch.equal(output(again), changed)
    with pytest.raises(BadInput, match="cannot be merged"):
        wrapped.merge_adapter()
    wrapped.add_adapter("other", RoutedAdapterConfig(r=4, route="add", shared=name == "bert", layers=[1]))
    assert torch.equal(output(wrapped), changed)
    wrapped.set_adapter("other")
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained and all(".other." in n for n in trained)
    assert not torch.equal(output(wrapped), changed)
    wrapped.set_adapter("default")
    assert torch.equal(output(wrapped), changed)
    wrapped.delete_adapter("other")
    assert torch.equal(output(wrapped), changed)
    assert torch.equal(output(wrapped.unload()), before)


def test_a_bfloat16_base_has_float32_trainables_and_bfloat16_activations():
    wrapped = wrap(bert().to(torch.bfloat16), train_norms=True)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert output(wrapped).dtype == torch.bfloat16


def test_own_input_as_condition_needs_nothing_published_and_never_the_future():
    assert wrap(bert(), route="matmul1", condition="self")(IDS)[0].shape == (2, 5, D)
    for condition in ("self", "self_mean"):
        with pytest.raises(BadInput, match="future"):
            wrap(gpt2(), route="matmul1", condition=condition)


@pytest.mark.parametrize(
    ("build", "options", "says"),
    [
        (bert, {"route": "mull"}, "route"),
        (bert, {"variant": "after_up"}, "variant"),
        (bert, {"variant": "split", "r": 6}, "multiple of 4"),
        (bert, {"variant": "split", "route": "none"}, "routed"),
        (bert, {"variant": "cross_attention", "r": 8}, "heads"),
        (bert, {"r": 0}, "1 or more"),
        (bert, {"after": ["cross"]}, "cross"),
        (bert, {"after": []}, "at least one"),
        (bert, {"activation": "softmax"}, "activation"),
        (bert, {"layers": [9]}, "layers"),
        (bert, {"condition": "cross"}, "cross-attention"),
        (bert, {"train_norms": ["*.nothing"]}, "matches no norm"),
        (gpt2, {"route": "xtxt"}, "future"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(build, options, says):
    with pytest.raises(BadInput, match=says) as refused:
        wrap(build(), **options)
    assert "\n" not in str(refused.value)


def test_checks_work_from_sites_and_a_width_alone():
    with torch.device("meta"):
        sites = find_sites(bert())
    method = methods.get("routed_adapter")
    method.check(RoutedAdapterConfig(), sites, D)
    with pytest.raises(BadInput, match="width 16 and the condition has 24"):
        method.check(RoutedAdapterConfig(), sites, 24)
    with pytest.raises(BadInput, match="needs a condition"):
        method.check(RoutedAdapterConfig(), sites, None)
    method.check(RoutedAdapterConfig(route="none"), sites, None)
    with pytest.raises(BadInput, match="none was published"):
        wrap(bert())(IDS)
