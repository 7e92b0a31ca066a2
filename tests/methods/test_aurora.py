"""Aurora: outputs against the equations, and which parameters train."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from mmpeft_ds import AuroraConfig, methods
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.aurora.layer import AttentionEnd, AuroraLinear, Factors, GatedEnd
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.condition import Condition, conditioned, enable_checkpointing
from tests.helpers.models.tiny_aurora import IDS, D, answering, attach, blip, clip, fill, grads, output, pixels
from tests.helpers.models.tiny_stock import bert, gpt2


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def shared(model):
    """The factors of an adapted model, by what they are."""
    found = [m for m in model.modules() if isinstance(m, Factors)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("multimodal", [True, False])
@pytest.mark.parametrize("form", ["tucker", "cp"])
def test_without_up_and_gates_it_is_the_backbone_to_the_bit(form, multimodal):
    model = blip()
    before = output(model, multimodal)
    wrapped = attach(model, filled=False, form=form, gate_std=0)
    assert torch.equal(output(wrapped, multimodal), before)
    assert not torch.equal(output(fill(wrapped), multimodal), before)


def test_the_published_gates_start_near_zero_and_only_matter_with_an_image():
    model = blip()
    before = [output(model, m) for m in (True, False)]
    wrapped = attach(model, filled=False)
    assert torch.equal(output(wrapped, False), before[1])
    difference = (output(wrapped) - before[0]).abs().max()
    assert 0 < difference < 1e-3


def test_start_values():
    r = 64
    wrapped = attach(blip(), filled=False, r=r)
    own = shared(wrapped)
    assert own.down.shape == (r, D) and own.up.shape == (D, r) and own.core.shape == (r, r, r)
    assert not own.up.any()
    bounds = {"down": (own.down, D**-0.5), "core": (own.core, 3**0.5 / r)}
    base = wrapped.get_base_model()
    modes = {"qkv": 4, "projection": 4, "fc1": 8, "fc2": 8}
    for name, columns in modes.items():
        layer = base.vision_model.encoder.layers[0]
        leaf = getattr(layer.self_attn if columns == 4 else layer.mlp, name)
        bounds[name] = leaf.aurora["default"].mode, (6 / (r + columns)) ** 0.5
    query = base.text_encoder.encoder.layer[0].attention.self.query
    bounds["query"] = query.aurora["default"].mode, (6 / (r + 1)) ** 0.5
    for name, (parameter, bound) in bounds.items():
        # uniform in (-bound, bound)
        assert 0.9 * bound < parameter.abs().max() <= bound, name
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.2), name
    assert not any(p.any() for n, p in attach(blip(), filled=False, gate_std=0).named_parameters() if "gates" in n)
    ones = shared(attach(blip(), filled=False, form="cp")).core
    assert torch.equal(ones, torch.ones(4))


def test_only_what_is_listed_trains_and_the_factors_exist_once():
    wrapped = attach(blip(), filled=False, modules_to_save=["vision_proj", "itm_head"])
    names = set(trained(wrapped))
    kinds = methods.get("aurora").kinds(sorted(names))
    assert {n.rpartition(".modules_to_save.")[0].rpartition(".")[2] for n in kinds["head"]} == {
        "vision_proj",
        "itm_head",
    }
    peft_names = kinds["peft"]
    last = [n.rpartition(".")[2] for n in peft_names]
    assert {k: last.count(k) for k in ("down", "up", "core")} == {"down": 1, "up": 1, "core": 1}
    gates = ("self_scale", "self_shift", "cross_scale", "cross_shift")
    assert all(last.count(g) == 2 for g in gates)
    assert last.count("mode") == 2 * 4 + 2 * 6
    assert len(last) == 3 + 8 + 20
    assert not any("text_proj" in n for n in names)
    assert sum("aurora_shared" in n for n in wrapped.state_dict()) == 3


def test_fused_q_k_v_and_the_other_maps_add_their_deltas():
    wrapped = attach(blip().double(), scale=0.5)
    layer, own = wrapped.get_base_model().vision_model.encoder.layers[1], shared(wrapped)
    x = torch.randn(2, 5, D, dtype=torch.float64)

    def delta(leaf, k):
        g = torch.einsum("ijr,r->ij", own.core, leaf.aurora["default"].mode[:, k])
        return x @ own.down.T @ g @ own.up.T

    qkv, out = layer.self_attn.qkv, layer.self_attn.projection
    want = qkv.base_layer(x) + torch.cat([delta(qkv, k) for k in range(3)], -1)
    torch.testing.assert_close(qkv(x), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(out(x), out.base_layer(x) + 0.5 * delta(out, 0), rtol=0, atol=1e-12)
    query = wrapped.get_base_model().text_encoder.encoder.layer[0].crossattention.self.query
    torch.testing.assert_close(query(x), query.base_layer(x) + delta(query, 0), rtol=0, atol=1e-12)
    everywhere = attach(blip().double(), scale=0.5, scale_all=True)
    query = everywhere.get_base_model().text_encoder.encoder.layer[0].attention.self.query
    own = shared(everywhere)
    torch.testing.assert_close(query(x), query.base_layer(x) + 0.5 * delta(query, 0), rtol=0, atol=1e-12)


def test_some_parts_of_a_fused_projection():
    wrapped = attach(blip().double(), image_targets=["k"])
    leaf = wrapped.get_base_model().vision_model.encoder.layers[0].self_attn.qkv
    x = torch.randn(2, 5, D, dtype=torch.float64)
    added = leaf(x) - leaf.base_layer(x)
    assert not added[..., :D].any() and not added[..., 2 * D :].any()
    assert added[..., D : 2 * D].abs().min() > 0
    assert leaf.aurora["default"].mode.shape == (4, 1)


def test_the_cp_form_equals_a_core_with_its_values_on_the_superdiagonal():
    cp, full = attach(blip().double(), form="cp"), attach(blip().double())
    values = dict(cp.named_parameters())
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.endswith(".core"):
                parameter.zero_()
                parameter[range(4), range(4), range(4)] = values[name]
            else:
                parameter.copy_(values[name])
    torch.testing.assert_close(output(full), output(cp), rtol=0, atol=1e-12)


def test_gates_follow_the_last_norm_of_a_layer_that_saw_an_image():
    wrapped, bare = attach(blip().double()), attach(blip().double(), gates=False)
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            parameter.copy_(wrapped.get_parameter(name))
    layer, plain = (m.get_base_model().text_encoder.encoder.layer[0] for m in (wrapped, bare))
    x, states = (torch.randn(2, n, D, dtype=torch.float64) for n in (5, 7))
    own = plain.attention(x)[0]
    cross = plain.crossattention(own, encoder_hidden_states=states)[0]
    gates = layer.output.LayerNorm.aurora_gates["default"]
    want = plain(x, states) + 0.1 * (own * gates.self_scale + gates.self_shift)
    want = want + 0.1 * (cross * gates.cross_scale + gates.cross_shift)
    torch.testing.assert_close(layer(x, states), want, rtol=0, atol=1e-12)
    assert torch.equal(layer(x), plain(x)), "text mode"


def captured(model):
    return [m.captured for m in model.modules() if isinstance(m, GatedEnd)]


def empty(model):
    return all(c.own is None and c.cross is None for c in captured(model))


def test_nothing_is_left_behind_by_a_forward_or_by_one_that_broke():
    wrapped = attach(blip())
    before = output(wrapped, multimodal=False)
    output(wrapped)
    assert empty(wrapped)

    layer = wrapped.get_base_model().text_encoder.encoder.layer[0]
    hook = layer.intermediate.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        output(wrapped)
    hook.remove()
    assert not empty(wrapped), "the control: it broke between attention and the end"
    assert torch.equal(output(wrapped, multimodal=False), before)
    assert empty(wrapped)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [blip, answering])
def test_activation_checkpointing_changes_no_gradient_and_leaves_nothing_behind(build, reentrant):
    def step(checkpointed):
        wrapped = attach(build().double()).train()
        if checkpointed:
            enable_checkpointing(wrapped.get_base_model(), use_reentrant=reentrant)
        # Two forwards, the second without an image, before one backward.
        base = wrapped.get_base_model()
        base.vision_model.embeddings.class_embedding.requires_grad_(True)
        base.text_encoder.embeddings.word_embeddings.weight.requires_grad_(True)
        loss = output(wrapped).square().sum() + 2 * output(wrapped, multimodal=False).square().sum()
        if build is answering:
            states = output(wrapped)
            loss = loss + base.text_decoder(IDS, encoder_hidden_states=states, use_cache=False).logits.square().sum()
        loss.backward()
        assert empty(wrapped)
        return grads(wrapped)

    plain, again = step(False), step(True)
    assert all(g is not None for g in plain.values())
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


def test_every_trained_number_has_a_gradient():
    wrapped = attach(blip())
    output(wrapped).square().sum().backward()
    assert all(g is not None and g.any() for g in grads(wrapped).values())
    assert not any(p.grad is not None for p in wrapped.parameters() if not p.requires_grad)


def test_one_step_against_finite_differences():
    wrapped = attach(blip().double())
    torch.manual_seed(0)
    names = trained(wrapped)
    direction = {n: torch.randn_like(p) for n, p in names.items()}

    def loss():
        return output(wrapped).square().sum()

    loss().backward()
    slope = sum((p.grad * direction[n]).sum() for n, p in names.items()).item()
    ends = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for n, p in names.items():
                p.add_(step * direction[n])
            ends.append(loss().item())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_frames_are_weighted_in_the_keys_of_cross_attention_only():
    wrapped = attach(blip().double())
    layer = wrapped.get_base_model().text_encoder.encoder.layer[0]
    states = torch.randn(2, 12, D, dtype=torch.float64)
    weights = torch.rand(2, 3, dtype=torch.float64)
    leaves = {name: getattr(layer.crossattention.self, name) for name in ("query", "key", "value")}
    plain = {name: leaf(states) for name, leaf in leaves.items()}
    own = layer.attention.self.key(states)
    with conditioned(Condition(frame_weights=weights)):
        for name, leaf in leaves.items():
            assert torch.equal(leaf(states), plain[name]) == (name != "key")
        got = leaves["key"](states).unflatten(1, (3, 4))
        assert torch.equal(layer.attention.self.key(states), own)
        beams = leaves["key"](states.repeat_interleave(2, 0))
        with wrapped.disable_adapter():
            assert torch.equal(leaves["key"](states), leaves["key"].base_layer(states))
        with pytest.raises(BadInput, match="frames of equal length"):
            leaves["key"](states[:, :11])
    before = plain["key"].unflatten(1, (3, 4))
    assert torch.equal(got[:, :, 0], before[:, :, 0])
    torch.testing.assert_close(got[:, :, 1:], before[:, :, 1:] * weights[:, :, None, None])
    torch.testing.assert_close(beams, got.flatten(1, 2).repeat_interleave(2, 0))


def test_each_pair_of_widths_has_its_factors_and_the_core_is_one():
    wrapped = attach(clip())
    factors = [m for m in wrapped.modules() if isinstance(m, Factors)]
    assert {tuple(f.down.shape) + tuple(f.up.shape) for f in factors} == {(4, 24, 24, 4), (4, 16, 16, 4)}
    assert sum(f.core is not None for f in factors) == 1
    deltas = [d for m in wrapped.modules() if isinstance(m, AuroraLinear) for d in m.aurora.values()]
    assert len({id(d.borrowed[1].core) for d in deltas}) == 1
    out = wrapped(input_ids=IDS, pixel_values=pixels())
    (out.logits_per_image.square().sum()).backward()
    assert all(g is not None and g.any() for g in grads(wrapped).values())
    assert not any(isinstance(m, GatedEnd) for m in wrapped.modules())


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 23}
    return LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.mark.parametrize(
    ("build", "groups"),
    [(bert, 1), (lambda: bert(roberta=True), 1), (gpt2, 1), (llama, 2)],
    ids=["bert", "roberta", "gpt2", "llama"],
)
def test_the_attention_of_other_families(build, groups):
    model = build()
    before = model(IDS)[0]
    wrapped = attach(model, filled=False)
    assert torch.equal(wrapped(IDS)[0], before)
    assert len([m for m in wrapped.modules() if isinstance(m, Factors)]) == groups
    assert not torch.equal(fill(wrapped)(IDS)[0], before)
    assert not any(isinstance(m, AttentionEnd) for m in wrapped.modules()), "no cross-attention, no gates"


def test_a_conv1d_adds_to_the_parts_that_are_named():
    wrapped = attach(gpt2().double(), text_targets=["q", "v", "fc1", "fc2"])
    leaf = wrapped.get_base_model().transformer.h[0].attn.c_attn
    x = torch.randn(2, 5, D, dtype=torch.float64)
    added = leaf(x) - F.linear(x, leaf.base_layer.weight.T, leaf.base_layer.bias)
    assert added[..., :D].any() and added[..., 2 * D :].any()
    torch.testing.assert_close(added[..., D : 2 * D], torch.zeros(2, 5, D).double(), rtol=0, atol=1e-12)


def test_a_decoder_with_cross_attention_of_another_family_is_gated_too():
    wrapped = attach(bert(is_decoder=True, add_cross_attention=True))
    states = torch.randn(2, 7, D)
    seen = wrapped(IDS, encoder_hidden_states=states)[0]
    bare = attach(bert(is_decoder=True, add_cross_attention=True), gates=False)
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            parameter.copy_(wrapped.get_parameter(name))
    assert (seen - bare(IDS, encoder_hidden_states=states)[0]).abs().max() > 1e-3


def test_writing_with_a_cache_equals_writing_without():
    wrapped = attach(answering())
    decoder = wrapped.get_base_model().text_decoder
    states = output(wrapped)
    full = decoder(IDS, encoder_hidden_states=states, use_cache=False).logits
    first = decoder(IDS[:, :3], encoder_hidden_states=states, use_cache=True)
    rest = decoder(IDS[:, 3:], encoder_hidden_states=states, past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), full, rtol=1e-5, atol=1e-5)
    assert empty(wrapped)


def test_dropout_follows_the_mode_of_dropout_modules():
    """The engine turns dropout off by putting dropout modules alone into eval mode."""
    wrapped = attach(blip(), dropout=0.5)
    assert torch.equal(output(wrapped), output(wrapped)), "an eval model stays one when an adapter comes"
    wrapped.train()
    assert not torch.equal(output(wrapped), output(wrapped))
    for module in wrapped.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    assert torch.equal(output(wrapped), output(wrapped))


def test_a_bfloat16_base_has_float32_trainables_and_bfloat16_activations():
    wrapped = attach(blip().to(torch.bfloat16))
    assert {p.dtype for p in trained(wrapped).values()} == {torch.float32}
    out = output(wrapped)
    assert out.dtype == torch.bfloat16
    exact = attach(blip().to(torch.bfloat16).float())
    torch.testing.assert_close(out.float(), output(exact), rtol=0.1, atol=0.15)


def test_every_field_has_its_help():
    fields = AuroraConfig.own_fields().values()
    assert len(fields) > 10 and all(f.metadata.get("help") for f in fields)


def test_the_check_needs_sites_alone():
    with torch.device("meta"):
        sites = find_sites(blip())
    method = methods.get("aurora")
    method.check(AuroraConfig(), sites, None)
    with pytest.raises(BadInput, match="no tower"):
        method.check(AuroraConfig(towers=["sound"]), sites, None)


@pytest.mark.parametrize(
    ("build", "options", "says"),
    [
        (blip, {"form": "cpp"}, "form"),
        (blip, {"image_targets": ["q", "fc3"]}, "image_targets"),
        (blip, {"text_targets": ["q", "q"]}, "once"),
        (blip, {"text_targets": [], "image_targets": []}, "both are empty"),
        (blip, {"r": 0}, "1 or more"),
        (blip, {"dropout": 1.0}, "dropout"),
        (blip, {"gate_std": -1.0}, "gate_std"),
        (blip, {"towers": "text"}, "towers: expected a list"),
        (blip, {"towers": ["vision"]}, "no tower 'vision'"),
        (blip, {"layers": [0, 7]}, "layers"),
        (blip, {"layers": []}, "leave no layer"),
        (blip, {"towers": ["image"], "image_targets": []}, "nothing to adapt"),
        (bert, {"gates": True}, "cross-attention"),
        (lambda: blip(intermediate_size=40), {"text_targets": ["fc1"]}, "multiple"),
        (llama, {"text_targets": ["q", "fc2"]}, "gated block"),
        (lambda: blip(chunk_size_feed_forward=1), {}, "chunk_size_feed_forward"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(build, options, says):
    with pytest.raises(BadInput, match=says) as refused:
        output(attach(build(), **options))
    assert "\n" not in str(refused.value)
