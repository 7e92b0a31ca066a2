"""p-Adapter on every family: what it adds, where its gradients go, caches, precision."""

import copy

import peft
import pytest
import torch
from tiny_families import FAMILIES, IDS, MEMORY, build, forward, output
from torch import nn

from mmpeft_ds import PAdapterConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.p_adapter.layer import AttentionLayer, BranchLayer
from mmpeft_ds.sites import observe

# BLIP text keeps its probabilities under whatever name the model was given
IMPLEMENTATIONS = {name: ("eager",) if name.startswith("blip") else ("eager", "sdpa") for name in FAMILIES}
EACH = [(name, how) for name, hows in IMPLEMENTATIONS.items() for how in hows]
DECODERS = ["bert_decoder", "gpt2", "llama", "qwen2", "blip_text", "bart"]


def wrap(name: str, scale: float = 0.3, how: str | None = None, seed: int = 5, **options) -> peft.PeftModel:
    """A tiny model of a family with an adapter that does something; BART gets it in both towers."""
    model = build(name, **({} if how is None else {"attn_implementation": how}))
    options = {"r": 4, "r2": 4, "groups": 3, **({"tower": ["text"]} if name == "bart" else {}), **options}
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, PAdapterConfig(**options))
    with torch.no_grad():
        for n, parameter in wrapped.named_parameters():
            if parameter.requires_grad and not n.endswith((".p", ".m")):
                parameter.add_(scale * torch.randn_like(parameter))
    return wrapped


def branches(model: nn.Module) -> list[nn.Module]:
    return [m.p_adapter["default"] for m in model.modules() if isinstance(m, BranchLayer)]


def graphs(model: nn.Module) -> list[nn.Module]:
    return [m.p_adapter["default"].graph for m in model.modules() if isinstance(m, AttentionLayer)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "how"), EACH)
def test_the_maps_are_those_that_the_model_returns(name, how):
    model = wrap(name, how=how)
    seen = []
    for graph in graphs(model):
        graph.register_forward_hook(lambda graph, args, out: seen.append(graph.attention(args[0])))
    out = output(name, model)
    eager = build(name, attn_implementation="eager")
    eager = peft.get_peft_model(eager, copy.deepcopy(model.peft_config["default"]))
    eager.load_state_dict(model.state_dict())
    returned = forward(name, eager, output_attentions=True)
    torch.testing.assert_close(returned[0], out, rtol=1e-4, atol=1e-5)
    keys = ("encoder_attentions", "decoder_attentions", "attentions", "cross_attentions")
    maps = [a for key in keys for a in returned.get(key) or ()]
    assert len(maps) == len(seen) > 1
    for have in seen:
        assert any(want.shape == have.shape and torch.allclose(want, have, atol=1e-5) for want in maps)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_whose_up_is_zero_or_that_is_disabled_leaves_the_frozen_output_to_the_bit(name):
    model = build(name)
    before = output(name, model)
    wrapped = wrap(name)
    changed = output(name, wrapped)
    assert (changed - before).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(output(name, wrapped), before)
    assert torch.equal(output(name, wrapped), changed)
    for branch in branches(wrapped):
        nn.init.zeros_(branch.up.weight)
        nn.init.zeros_(branch.up.bias)
    assert torch.equal(output(name, wrapped), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trained_tensor_and_what_lies_below_gets_a_gradient(name):
    model = wrap(name, sublayers=["self", "cross"])
    seen = []
    for graph in graphs(model):
        graph.register_forward_hook(lambda graph, args, out: seen.append(graph.attention(args[0])))
    queries = [m for n, m in model.named_modules() if n.endswith((".q_proj", ".query", ".qkv", ".c_attn"))]
    for query in queries:
        query.weight.requires_grad_()
    out = output(name, model)
    for A in seen:
        A.retain_grad()
    out.square().sum().backward()
    without = [
        n for n, p in trained(model).items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert not without
    assert all(query.weight.grad.any() for query in queries)


def test_the_branch_sends_gradient_into_the_attention_map():
    model = wrap("bert", sublayers=["self"], layers=[1])
    layer = next(m for m in model.modules() if isinstance(m, AttentionLayer))
    key = model.get_submodule("base_model.model.encoder.layer.1.attention.self.key")
    key.weight.requires_grad_()
    # The context path is cut: whatever reaches the keys now went through the map that the branch reads.
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    output("bert", model).square().sum().backward()
    assert key.weight.grad.any()


@pytest.mark.parametrize("options", [{}, {"p": 2.5, "mu": 3.0}, {"propagation": "gcn"}, {"propagation": "appnp"},
                                     {"propagation": "gcnii"}, {"self_loops": "drop"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_changes_nothing(name, options):
    if options and name not in ("gpt2", "blip_text"):
        pytest.skip("one family of each kind is enough")
    model = wrap(name, **options)
    whole, steps = decoded(name, model)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)


def test_the_released_decode_graph_differs_from_training_as_documented():
    model = wrap("gpt2", decode_graph="released")
    whole, steps = decoded("gpt2", model)
    assert torch.allclose(steps[:, 0], whole[:, 0], atol=1e-5), "the first token has no past"
    assert not torch.allclose(steps[:, 1:], whole[:, 1:], atol=1e-3)


def decoded(name: str, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all positions at once, and fed by one token, then two, then one by one."""
    memory = {"encoder_hidden_states": MEMORY} if name in ("bert_decoder", "gpt2", "blip_text") else {}
    ids = IDS
    if name == "bart":
        base = model.get_base_model()
        memory = {"encoder_outputs": (base.get_encoder()(ids).last_hidden_state,)}
    argument = "decoder_input_ids" if name == "bart" else "input_ids"
    with torch.no_grad():
        whole = model(**{argument: ids}, **memory, use_cache=False).logits
        past, steps = None, []
        for start, end in ((0, 1), (1, 3), (3, 4), (4, 5), (5, 6)):
            out = model(**{argument: ids[:, start:end]}, **memory, past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    return whole, torch.cat(steps, 1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "blip_text"])
def test_beams_with_a_cache_write_what_they_write_without(name):
    model = wrap(name, scale=1.0).get_base_model()
    given = {"encoder_hidden_states": MEMORY} if name in ("gpt2", "blip_text") else {}
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "output_scores": True}
    written = [
        model.generate(IDS, **given, **options, use_cache=cached, return_dict_in_generate=True)
        for cached in (True, False)
    ]
    assert torch.equal(written[0].sequences, written[1].sequences)
    torch.testing.assert_close(written[0].sequences_scores, written[1].sequences_scores, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_for_the_tokens_that_count():
    model = wrap("bert")
    longer = torch.cat([IDS, torch.full((2, 3), 7)], 1)
    mask = torch.ones_like(longer)
    mask[:, IDS.shape[1] :] = 0
    padded = model(longer, attention_mask=mask)[0][:, : IDS.shape[1]]
    torch.testing.assert_close(padded, model(IDS)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_activation_checkpointing_gives_the_same_gradients(name, reentrant):
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = wrap(name).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        base = model.get_base_model()
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        more = {"use_cache": False} if name != "bert" else {}
        output(name, model, **more).square().sum().backward()
        assert not observe._open.get(), "an observation is still open"
        return {n: p.grad for n, p in trained(model).items()}

    plain, recomputed = gradients(False), gradients(True)
    for n, gradient in plain.items():
        torch.testing.assert_close(recomputed[n], gradient, rtol=1e-4, atol=1e-6)


def test_two_forwards_before_one_backward_do_not_mix():
    model = wrap("bert")
    one, two = (model(ids)[0].square().sum() for ids in (IDS, IDS.flip(1)))
    (one + two).backward()
    both = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    for ids in (IDS, IDS.flip(1)):
        model(ids)[0].square().sum().backward()
    for n, p in trained(model).items():
        torch.testing.assert_close(both[n], p.grad, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_behind_by_a_forward_even_by_one_that_fails():
    model = wrap("gpt2")
    attention = model.get_submodule("base_model.model.transformer.h.0.attn")
    config, hooks = attention.config, count_hooks(model)
    output("gpt2", model)
    assert attention.config is config and count_hooks(model) == hooks
    broken = attention.c_proj.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output("gpt2", model)
    broken.remove()
    assert attention.config is config and count_hooks(model) == hooks
    assert not observe._open.get()


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_copy_of_the_model_observes_itself():
    model = wrap("bert")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(output("bert", twin), output("bert", wrap("bert")))


# ------------------------------------------------------------------------------------------------------ precision


def test_under_bfloat16_autocast_the_gradient_of_p_keeps_float32_quality():
    def gradient_of_p(autocast: bool, power: float) -> torch.Tensor:
        model = wrap("bert", sublayers=["self"], layers=[0], p=power)
        # Equal inputs of the branch in both cases, of which bf16 loses nothing.
        layer = next(m for m in model.modules() if isinstance(m, AttentionLayer))
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randn(2, 6, 16, generator=generator).bfloat16().float()
        heads = tokens.unflatten(-1, (2, 8)).transpose(1, 2)
        seen = observe.Observation(q=tokens, query=heads, key=heads, value=heads, project=nn.Identity())
        with observe.observing(layer, seen), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(tokens)
        assert out.isfinite().all()
        out.square().sum().backward()
        return graphs(model)[0].p.grad

    for power in (1.25, 1.5, 1.75, 2.5):
        torch.testing.assert_close(gradient_of_p(True, power), gradient_of_p(False, power), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["bert", "llama", "blip_text", "vit"])
def test_a_bfloat16_base_keeps_float32_trainables_and_finite_gradients(name):
    model = build(name).bfloat16()
    wrapped = peft.get_peft_model(model, PAdapterConfig(r=4, r2=4, groups=3))
    assert {p.dtype for p in trained(wrapped).values()} == {torch.float32}
    out = output(name, wrapped)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained(wrapped).values())


def test_rows_that_see_no_key_are_finite_and_get_their_own_node():
    layer = next(m for m in wrap("bert", sublayers=["self"]).modules() if isinstance(m, AttentionLayer))
    tokens = torch.randn(2, 6, 16)
    heads = tokens.unflatten(-1, (2, 8)).transpose(1, 2).requires_grad_()
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2, :] = False
    seen = observe.Observation(q=tokens, query=heads, key=heads, value=heads, mask=mask, project=nn.Identity())
    with observe.observing(layer, seen):
        out = layer(tokens)
    assert out.isfinite().all()
    out.sum().backward()
    assert heads.grad.isfinite().all()


def test_p_is_used_within_bounds_and_finds_its_way_back():
    model = wrap("bert", layers=[0], sublayers=["self"])
    graph = graphs(model)[0]
    with torch.no_grad():
        graph.p.fill_(5.0)
    assert graph.exponent.item() == 3.0
    for descent, moves in ((1.0, True), (-1.0, False)):
        graph.p.grad = None
        (descent * graph.exponent).sum().backward()
        assert bool(graph.p.grad.any()) is moves, "outside, only the step that leads back is taken"
    free = graphs(wrap("bert", layers=[0], sublayers=["self"], clamp_p=False, p=0.5))[0]
    assert free.exponent.item() == 0.5


# ---------------------------------------------------------------------------------------------------- other forms


def test_the_published_form_takes_the_place_of_the_attention_output():
    model = wrap("vit", mode="published", sublayers=["self"])
    assert not any(n.endswith((".m", "gate.weight")) for n in trained(model))
    out = output("vit", model)
    out.square().sum().backward()
    assert all(p.grad.any() for p in trained(model).values())
    projection = model.get_submodule("base_model.model.layers.0.attention.o_proj")
    assert isinstance(projection, AttentionLayer)
    seen = []
    projection.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    first = output("vit", model)
    handle = projection.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert torch.equal(output("vit", model), first), "the context no longer counts"
    handle.remove()


@pytest.mark.parametrize("content", ["zeros", "noise"])
def test_query_nodes_can_be_replaced_in_cross_attention(content):
    ordinary, replaced = (wrap("blip_text", query_node=c, sublayers=["cross"]) for c in ("query", content))
    assert not torch.allclose(output("blip_text", ordinary), output("blip_text", replaced), atol=1e-4)
    again = output("blip_text", replaced)
    assert torch.equal(again, output("blip_text", replaced)) is (content == "zeros")


def test_sublayers_layers_and_towers_can_be_chosen():
    def paths(name, **options):
        return sorted(n for n, m in wrap(name, **options).named_modules() if isinstance(m, BranchLayer))

    assert len(paths("blip_text")) == 6
    assert len(paths("blip_text", sublayers=["cross"], layers=[1])) == 1
    assert all("encoder.layers" in p for p in paths("bart", tower="model.encoder"))
    assert len(paths("bart")) == 2 * 2 + 3 * 2


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("bert", {"r": 3}, "must divide the width of a head"),
        ("bert", {"r": 0}, "1 or more"),
        ("bert", {"r2": 32}, "no bottleneck"),
        ("bert", {"groups": 0}, "groups"),
        ("bert", {"p": 3.5}, "clamp_p: false"),
        ("bert", {"p": 1.2, "p_cross": -1.0}, "positive"),
        ("bert", {"mu": 0.0}, "positive"),
        ("bert", {"mode": "paper"}, "mode: 'paper' is unknown"),
        ("bert", {"sublayers": ["selv"]}, "sublayers"),
        ("bert", {"sublayers": []}, "at least one"),
        ("bert", {"sublayers": ["cross"]}, "has none of cross"),
        ("bert", {"kernel": "stream", "self_loops": "drop"}, "attention matrix"),
        ("gpt2", {"mode": "published"}, "causal"),
        ("blip_text", {"mode": "published", "sublayers": ["cross"]}, "causal"),
        ("vit", {"mode": "published", "propagation": "gcn"}, "published"),
        ("bert", {"layers": [7]}, "layers"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name, options, says):
    with pytest.raises(BadInput, match=says) as refused:
        wrap(name, **options)
    assert "\n" not in str(refused.value)


def test_families_that_cannot_be_observed_are_refused():
    import transformers as tf

    t5 = tf.T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=32, vocab_size=23)
    with pytest.raises(BadInput, match="position bias"):
        peft.get_peft_model(tf.T5EncoderModel(t5), PAdapterConfig(r=4, r2=4))
    model = wrap("bert", how="sdpa")
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    with pytest.raises(BadInput, match="attn_implementation='sdpa' or 'eager'"):
        output("bert", model)


def test_a_static_cache_is_refused():
    model = wrap("llama").get_base_model()
    with pytest.raises(BadInput, match="static"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")
