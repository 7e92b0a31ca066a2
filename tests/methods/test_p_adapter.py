"""p-Adapter on every family: what it adds, where its gradients go, caches, precision. The verbs of peft are tested for
all methods together."""

import copy

import peft
import pytest
import torch
from torch import nn

from mmpeft_ds import PAdapterConfig, methods
from mmpeft_ds.engine.optim.optimizers import parameter_groups
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.p_adapter.layer import AttentionLayer, BranchLayer
from mmpeft_ds.recipe import Recipe
from mmpeft_ds.sites import observe
from tests.helpers.models.tiny_stock import IDS, fill
from tests.helpers.models.tiny_zoo import ZOO, output

REFUSED = {"t5"}
# family -> options that choose its towers
TOWERS = {"bart": {"tower": ["text"]}, "blip": {"tower": ["text", "image"]}}
FAMILIES = [name for name in ZOO if name not in REFUSED]
EACH = [(name, how) for name in FAMILIES for how in (("eager",) if name == "blip" else ("eager", "sdpa"))]
DECODERS = ["bert_decoder", "gpt2", "llama", "qwen2", "bart", "blip"]


def wrap(name: str, how: str | None = None, scale: float = 0.3, **options) -> peft.PeftModel:
    """A tiny model of a family with an adapter that does something, in all of its towers."""
    options = {"r": 4, "r2": 4, "groups": 3, **TOWERS.get(name, {}), **options}
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(ZOO[name].build(how), PAdapterConfig(**options))
    fill(wrapped, scale=scale)
    with torch.no_grad():
        for graph in graphs(wrapped):
            if graph.p is not None:
                graph.p.fill_(graph.start)
    return wrapped


def run(name: str, model: nn.Module, **more) -> torch.Tensor:
    return output(model, ZOO[name], **more)


def layers(model: nn.Module) -> list[BranchLayer]:
    return [m for m in model.modules() if isinstance(m, BranchLayer)]


def graphs(model: nn.Module) -> list[nn.Module]:
    return [m.p_adapter["default"].graph for m in layers(model) if isinstance(m, AttentionLayer)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "how"), EACH)
def test_the_maps_are_those_that_the_model_returns(name, how):
    model = wrap(name, how)
    seen = []
    for graph in graphs(model):
        graph.register_forward_hook(lambda graph, args, out: seen.append(graph.attention(args[0])))
    out = run(name, model)
    eager = wrap(name, "eager")
    returned = returned_maps(name, eager)
    torch.testing.assert_close(run(name, eager), out, rtol=1e-4, atol=1e-4)
    assert len(returned) == len(seen) > 1
    for have in seen:
        assert any(want.shape == have.shape and torch.allclose(want, have, atol=1e-5) for want in returned)


def returned_maps(name: str, model: nn.Module) -> list[torch.Tensor]:
    """What the attention modules themselves return, one map a sublayer."""
    found = []
    for layer in layers(model):
        if isinstance(layer, AttentionLayer):
            module = model.get_base_model().get_submodule(layer.site.path)
            module.register_forward_hook(lambda module, args, out: found.append(out[1]))
    run(name, model)
    return list(found)


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "clip_text"])
def test_a_causal_tower_stays_causal_while_its_attention_is_observed(name, how):
    """transformers makes no mask for a model whose configuration names a registered attention function."""
    model, later = wrap(name, how), IDS.clone()
    later[:, 3:] += 1
    first, second = (run(name, model, input_ids=ids, attention_mask=None) for ids in (IDS, later))
    torch.testing.assert_close(first[:, :3], second[:, :3], rtol=0, atol=1e-6)
    assert (first[:, 3:] - second[:, 3:]).abs().max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_whose_up_is_zero_or_that_is_disabled_leaves_the_frozen_output_to_the_bit(name):
    before = run(name, ZOO[name].build())
    wrapped = wrap(name)
    changed = run(name, wrapped)
    assert (changed - before).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(run(name, wrapped), before)
    assert torch.equal(run(name, wrapped), changed)
    for layer in layers(wrapped):
        nn.init.zeros_(layer.p_adapter["default"].up.weight)
        nn.init.zeros_(layer.p_adapter["default"].up.bias)
    assert torch.equal(run(name, wrapped), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trained_tensor_and_the_queries_below_get_a_gradient(name):
    # an image whose only reader is a text tower trains through that
    model = wrap(name, sublayers=["self", "cross"])
    ends = (".q_proj", ".query", ".qkv", ".c_attn")
    # of the last layer of CLIP's vision tower and of ViT the class token alone is read
    queries = [m for n, m in model.named_modules() if n.endswith(ends)]
    for query in queries:
        query.weight.requires_grad_()
    run(name, model).square().sum().backward()
    assert not [n for n, p in trained(model).items() if p.grad is None or not p.grad.isfinite().all()]
    assert not [n for n, p in trained(model).items() if not p.grad.any()]
    assert all(query.weight.grad.any() for query in queries)


@pytest.mark.parametrize("kernel", ["dense", "stream"])
@pytest.mark.parametrize("name", ["bert", "blip"])
def test_the_branch_sends_gradient_into_the_attention_map(name, kernel):
    model = wrap(name, sublayers=["self"], layers=[1], kernel=kernel, **({"tower": "text"} if name == "blip" else {}))
    (layer,) = layers(model)
    key = model.get_base_model().get_submodule(layer.site.k.path)
    key.weight.requires_grad_()
    # The context path is cut: whatever reaches the keys now went through the map that the branch reads.
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    run(name, model).square().sum().backward()
    assert key.weight.grad.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_and_dense_steps_agree(name):
    outs, gradients = zip(*(outcome(name, wrap(name, kernel=kernel)) for kernel in ("dense", "stream")), strict=True)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    scale = max(g.abs().max() for g in gradients[0].values())
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-2, atol=1e-4 * scale.item())


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "blip"])
def test_a_projection_that_is_watched_is_called_and_gives_the_same(name):
    quick, called = wrap(name), wrap(name)
    calls = []
    for layer in layers(called):
        if isinstance(layer, AttentionLayer):
            out = called.get_base_model().get_submodule(layer.site.out.path)
            out = layer.base_layer if out is layer else out
            out.register_forward_hook(lambda module, args, out: calls.append(module))
    outs, gradients = zip(*(outcome(name, model) for model in (quick, called)), strict=True)
    assert len(calls) >= 2 * len(graphs(called)), "of the values, and at the end"
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    scale = max(g.abs().max() for g in gradients[0].values())
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-3, atol=1e-5 * scale.item())


def outcome(name: str, model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = run(name, model)
    out.square().mean().backward()
    return out, {n: p.grad for n, p in trained(model).items()}


OTHERS = [
    {"p": 2.5, "mu": 3.0},
    {"propagation": "gcn"},
    {"propagation": "appnp"},
    {"propagation": "gcnii"},
    {"self_loops": "drop"},
    {"groups": None},
    {"kernel": "dense"},
]
CACHED = [(name, {}) for name in DECODERS] + [("bert_decoder", options) for options in OTHERS]


@pytest.mark.parametrize(("name", "options"), CACHED, ids=str)
def test_a_cache_changes_nothing(name, options):
    whole, steps = decoded(name, wrap(name, **options))
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


def test_the_released_decode_graph_differs_from_training_as_documented():
    whole, steps = decoded("gpt2", wrap("gpt2", decode_graph="released", scale=1.0))
    assert torch.allclose(steps[:, 0], whole[:, 0], atol=1e-5), "the first token has no past"
    assert not torch.allclose(steps[:, 1:], whole[:, 1:], atol=1e-3)


def decoded(name: str, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all positions at once, and fed by one token, then two, then one by one."""
    model, given = model.get_base_model(), {}
    if name == "bert_decoder":
        inputs = ZOO[name].inputs()
        given = {key: inputs[key] for key in ("encoder_hidden_states", "encoder_attention_mask")}
    elif name == "bart":
        given = {"encoder_outputs": (model.get_encoder()(IDS).last_hidden_state,)}
    elif name == "blip":
        given = {"encoder_hidden_states": model.vision_model(ZOO[name].inputs()["pixel_values"])[0]}
        model = model.text_decoder
    argument = "decoder_input_ids" if name == "bart" else "input_ids"
    with torch.no_grad():
        whole = model(**{argument: IDS}, **given, use_cache=False).logits
        past, steps = None, []
        for start, end in ((0, 1), (1, 3), (3, 4), (4, 5)):
            out = model(**{argument: IDS[:, start:end]}, **given, past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    return whole, torch.cat(steps, 1)


def test_padding_changes_nothing_for_the_tokens_that_count():
    model = wrap("bert")
    longer = torch.cat([IDS, torch.full((2, 3), 7)], 1)
    mask = torch.ones_like(longer)
    mask[:, IDS.shape[1] :] = 0
    padded = model(longer, attention_mask=mask)[0][:, : IDS.shape[1]]
    torch.testing.assert_close(padded, model(IDS)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_recomputation_gives_the_same_gradients_and_leaves_nothing_open(name, reentrant):
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = wrap(name).train()
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.get_base_model().enable_input_require_grads()
        run(name, model, **({} if name == "bert" else {"use_cache": False})).square().mean().backward()
        assert not observe._open.get(), "an observation is still open"
        return {n: p.grad for n, p in trained(model).items()}

    plain, recomputed = gradients(False), gradients(True)
    for n, gradient in plain.items():
        torch.testing.assert_close(recomputed[n], gradient, rtol=1e-4, atol=1e-6)


def test_two_forwards_before_one_backward_do_not_mix():
    model = wrap("bert")
    one, two = (model(ids)[0].square().mean() for ids in (IDS, IDS.flip(1)))
    (one + two).backward()
    both = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    for ids in (IDS, IDS.flip(1)):
        model(ids)[0].square().mean().backward()
    for n, p in trained(model).items():
        torch.testing.assert_close(both[n], p.grad, rtol=1e-4, atol=1e-6)


def test_nothing_is_left_behind_by_a_forward_even_by_one_that_fails():
    model = wrap("gpt2")
    attention = model.get_submodule("base_model.model.transformer.h.0.attn")
    config, hooks = attention.config, count_hooks(model)
    run("gpt2", model)
    assert attention.config is config and count_hooks(model) == hooks
    for place in (attention.c_proj, model.get_submodule("base_model.model.transformer.h.0.mlp.c_proj")):
        broken = place.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("gpt2", model)
        broken.remove()
        assert attention.config is config and count_hooks(model) == hooks
        assert not observe._open.get()


@pytest.mark.parametrize("name", ["bert", "gpt2", "blip"])
def test_hooks_go_with_the_last_adapter(name):
    bare = count_hooks(ZOO[name].build())
    model = wrap(name)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    attached = count_hooks(model)
    model.delete_adapter("other")
    assert count_hooks(model) == attached > bare
    model.delete_adapter("default")
    assert count_hooks(model) == bare
    assert count_hooks(wrap(name).unload()) == bare


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_copy_of_the_model_observes_itself():
    model = wrap("bert")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(run("bert", twin), run("bert", wrap("bert")))


# ------------------------------------------------------------------------------------------------------ precision


def alone(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The first branch layer of `model` on tokens that are queries, keys and values themselves."""
    layer = layers(model)[0]
    heads = tokens.unflatten(-1, (2, 8)).transpose(1, 2)
    seen = observe.Observation(q=tokens, query=heads, key=heads, value=heads, mask=mask, project=nn.Identity())
    with observe.observing(layer, seen):
        return layer(tokens)


@pytest.mark.parametrize("kernel", ["dense", "stream"])
def test_under_bfloat16_autocast_the_gradient_of_p_keeps_float32_quality(kernel):
    def gradient_of_p(power: float, dtype: torch.dtype, autocast: bool) -> torch.Tensor:
        model = wrap("bert", sublayers=["self"], layers=[0], p=power, kernel=kernel).to(dtype)
        # of these inputs bfloat16 loses nothing
        tokens = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = alone(model, tokens)
        assert out.isfinite().all()
        out.square().sum().backward()
        return graphs(model)[0].p.grad.double()

    for power in (1.25, 1.5, 1.75, 2.5):
        exact = gradient_of_p(power, torch.float64, False)
        torch.testing.assert_close(gradient_of_p(power, torch.float32, True), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["bert", "llama", "blip", "vit"])
def test_a_bfloat16_base_has_finite_gradients(name):
    options = {"r": 4, "r2": 4, "groups": 3, **TOWERS.get(name, {})}
    wrapped = peft.get_peft_model(ZOO[name].build().bfloat16(), PAdapterConfig(**options))
    assert {p.dtype for p in trained(wrapped).values()} == {torch.float32}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in ZOO[name].inputs().items()}
    out = wrapped(**inputs)
    out = out.logits if name in ("llama", "blip") else out.last_hidden_state
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in trained(wrapped).values())


@pytest.mark.parametrize("kernel", ["dense", "stream"])
def test_rows_that_see_no_key_are_finite(kernel):
    tokens = torch.randn(2, 6, 16).requires_grad_()
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2, :] = False
    out = alone(wrap("bert", sublayers=["self"], layers=[0], kernel=kernel), tokens, mask)
    assert out.isfinite().all()
    out.sum().backward()
    assert tokens.grad.isfinite().all()


def test_p_is_used_within_bounds_and_finds_its_way_back():
    (graph,) = graphs(wrap("bert", layers=[0], sublayers=["self"]))
    with torch.no_grad():
        graph.p.fill_(5.0)
    assert graph.exponent.item() == 3.0
    for descent, moves in ((1.0, True), (-1.0, False)):
        graph.p.grad = None
        (descent * graph.exponent).sum().backward()
        assert bool(graph.p.grad.any()) is moves, "outside, only the step that leads back is taken"
    (free,) = graphs(wrap("bert", layers=[0], sublayers=["self"], clamp_p=False, p=0.5))
    assert free.exponent.item() == 0.5


@pytest.mark.parametrize("decay_p", [False, True])
def test_weight_decay_reaches_p_and_m_only_if_asked_for(decay_p):
    model = wrap("bert", decay_p=decay_p)
    recipe = Recipe(run_dir="", backbone={}, method={})
    recipe.optim.weight_decay = 0.05
    config = model.peft_config["default"]
    groups = parameter_groups(trained(model), recipe, lambda name: methods.of(config).decays(config, name))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in trained(model).items():
        scalar = name.endswith((".p", ".m"))
        assert (id(parameter) in decayed) == (decay_p if scalar else name.endswith("weight")), name


# ---------------------------------------------------------------------------------------------------- other forms


def test_the_published_form_takes_the_place_of_the_attention_output():
    model = wrap("vit", mode="published", sublayers=["self"])
    assert not any(n.endswith((".m", "gate.weight")) for n in trained(model))
    first = run("vit", model)
    first.square().sum().backward()
    assert all(p.grad.any() for p in trained(model).values())
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert torch.equal(run("vit", model), first), "the context no longer counts"


@pytest.mark.parametrize("content", ["zeros", "noise"])
def test_query_nodes_can_be_replaced_in_cross_attention(content):
    ordinary, replaced = (wrap("bert_decoder", query_node=c, sublayers=["cross"]) for c in ("query", content))
    out = run("bert_decoder", replaced)
    assert not torch.allclose(run("bert_decoder", ordinary), out, atol=1e-4)
    assert torch.equal(run("bert_decoder", replaced), out) is (content == "zeros")


def test_sublayers_layers_and_towers_can_be_chosen():
    def paths(name, **options):
        return sorted(layer.site.end for layer in layers(wrap(name, **options)))

    assert len(paths("blip", tower="text")) == 2 * 3
    assert len(paths("blip")) == 2 * 3 + 2 * 2
    assert len(paths("blip", tower="text", sublayers=["cross"], layers=[1])) == 1
    assert all("encoder.layers" in p for p in paths("bart", tower="model.encoder"))
    assert len(paths("bart")) == 2 * 2 + 2 * 3


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("bert", {"r": 3}, "must divide the width of a head"),
        ("bert", {"r": 0}, "1 or more"),
        ("bert", {"r2": 32}, "no bottleneck"),
        ("bert", {"groups": 0}, "groups"),
        ("bert", {"p": 3.5}, "clamp_p: false"),
        ("bert", {"p_cross": 0.5}, "clamp_p: false"),
        ("bert", {"p_cross": -1.0, "clamp_p": False}, "positive"),
        ("bert", {"mu": 0.0}, "positive"),
        ("bert", {"mode": "paper"}, "mode: 'paper' is unknown"),
        ("bert", {"sublayers": ["selv"]}, "sublayers"),
        ("bert", {"sublayers": []}, "at least one"),
        ("bert", {"sublayers": ["cross"]}, "has none of cross"),
        ("bert", {"kernel": "stream", "self_loops": "drop"}, "attention matrix"),
        ("gpt2", {"mode": "published"}, "causal"),
        ("blip", {"mode": "published", "sublayers": ["cross"], "tower": "text"}, "causal"),
        ("vit", {"mode": "published", "propagation": "gcn"}, "published"),
        ("bert", {"layers": [7]}, "layers"),
        ("t5", {}, "position bias"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name, options, says):
    with pytest.raises(BadInput, match=says) as refused:
        wrap(name, **({"tower": ["text"]} if name == "t5" else {}), **options)
    assert "\n" not in str(refused.value)


def test_attention_that_cannot_be_seen_is_refused():
    model = wrap("bert", "sdpa")
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    with pytest.raises(BadInput, match="attention implementation 'flash_attention_2'"):
        run("bert", model)
    with pytest.raises(BadInput, match="attention implementation 'flash_attention_2'"):
        model.add_adapter("late", copy.deepcopy(model.peft_config["default"]))


def test_a_static_cache_is_refused():
    with pytest.raises(BadInput, match="static"):
        wrap("llama").get_base_model().generate(IDS, max_new_tokens=2, cache_implementation="static")
