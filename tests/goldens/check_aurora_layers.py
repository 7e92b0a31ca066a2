"""Layer files of Aurora: a tiny BLIP layer of transformers, `get_peft_model`, weights and factors of the file."""

from __future__ import annotations

from collections.abc import Iterator

import peft
import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from mmpeft_ds import AuroraConfig
from mmpeft_ds.ops.context_enhancement import add_context, context_enhancement
from mmpeft_ds.ops.frame_weighting import frame_weights
from mmpeft_ds.sites.condition import Condition, conditioned
from tests.helpers.goldens import Golden, checks

SHARED = ("down", "up", "core")


def attached(model: nn.Module, golden: Golden) -> nn.Module:
    config = AuroraConfig(r=golden.array("core").shape[0])
    return peft.get_peft_model(model.double(), config).get_base_model()


def vision(golden: Golden) -> tuple[nn.Module, nn.Module]:
    """A tiny vision tower with Aurora, and its only layer."""
    width = golden.array("x").shape[-1]
    heads = int(golden.number("n_heads")) if "n_heads" in golden else 4
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=golden.array("w1").shape[0] if "w1" in golden else 4 * width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        layer_norm_eps=1e-6,
        image_size=8,
        patch_size=4,
    )
    model = attached(BlipVisionModel(config).eval(), golden)
    return model, model.encoder.layers[0]


def text(golden: Golden, heads: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """A tiny text tower with cross-attention and Aurora, and its only layer."""
    width = golden.array("x").shape[-1]
    config = BlipTextConfig(
        vocab_size=8,
        hidden_size=width,
        encoder_hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        layer_norm_eps=1e-12,
        attn_implementation="eager",
    )
    model = attached(BlipTextModel(config, add_pooling_layer=False).eval(), golden)
    return model, model.encoder.layer[0]


def load(golden: Golden, model: nn.Module, arrays: dict[str, Tensor]) -> None:
    """Copy the arrays named by file key into parameters or slices of them; factors into the one copy there is."""
    with torch.no_grad():
        for key, parameter in (arrays | factors(model)).items():
            parameter.copy_(golden.tensor(key).view_as(parameter))


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {k: [p for n, p in model.named_parameters() if n.endswith(f".default.{k}")] for k in SHARED}
    assert all(len(parameters) == 1 for parameters in found.values()), "the factors exist once"
    return {k: parameters[0] for k, parameters in found.items()}


def linear(prefix: str, suffix: str, module: nn.Module) -> dict[str, Tensor]:
    """Frozen weight and bias of a leaf under their keys, e.g. `self_` and `_q` for self_w_q and self_b_q."""
    frozen = getattr(module, "base_layer", module)
    return {f"{prefix}w{suffix}": frozen.weight, f"{prefix}b{suffix}": frozen.bias}


def norm(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return linear(f"{prefix}_", "", module)


def mode(module: nn.Module) -> nn.Parameter:
    return module.aurora["default"].mode


def vision_parts(golden: Golden, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[nn.Parameter]]]:
    """Frozen arrays of the layer that the file has, and the modes that stand side by side in each array of modes."""
    attention, mlp = layer.self_attn, layer.mlp
    frozen = linear("", "_qkv", attention.qkv) | linear("", "_out", attention.projection)
    frozen |= linear("", "1", mlp.fc1) | linear("", "2", mlp.fc2)
    frozen |= norm("ln1", layer.layer_norm1) | norm("ln2", layer.layer_norm2)
    in_attention = [mode(attention.qkv), mode(attention.projection)]
    in_mlp = [mode(mlp.fc1), mode(mlp.fc2)]
    modes = {"mode_attn": in_attention, "mode_mlp": in_mlp}
    if "mode" in golden:
        modes = {"mode": in_mlp if "w1" in golden else in_attention}
    with torch.no_grad():
        for key, parameters in modes.items():
            parts = golden.tensor(key).split([p.shape[1] for p in parameters], 1)
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part)
    return {k: p for k, p in frozen.items() if k in golden}, modes


def compare(golden: Golden, leaves: dict[str, Tensor], modes: dict[str, list[nn.Parameter]], suffix: str = "") -> None:
    """Every gradient of the file; what has none there must have none here."""
    given = leaves | {k: None for k in modes}
    got = {k: leaf.grad for k, leaf in leaves.items()}
    for key, parameters in modes.items():
        grads = [p.grad for p in parameters]
        got[key] = None if grads[0] is None else torch.cat(grads, 1)
    for key in given:
        if f"grad_{key}{suffix}" in golden:
            golden.same(f"grad_{key}{suffix}", got[key])
        else:
            assert got[key] is None or not got[key].any(), f"{golden.name}: {key} has a gradient"


@checks("aurora/vision_*")
def vision_layer(golden: Golden) -> None:
    golden.tolerance = 1e-10
    model, layer = vision(golden)
    frozen, modes = vision_parts(golden, layer)
    load(golden, model, frozen)
    for key, parameter in frozen.items():
        # Frozen in training; some files hold their gradients all the same.
        assert not parameter.requires_grad
        parameter.requires_grad_(f"grad_{key}" in golden)
    x = golden.tensor("x", requires_grad=True)
    if "ln1_w" in golden:
        out = layer(x)
    elif "w1" in golden:
        golden.same("hidden_preact", layer.mlp.fc1(x))
        out = layer.mlp(x)
    else:
        out = layer.self_attn(x)[0]
    golden.same("out", out)
    (out * golden.tensor("cotangent")).sum().backward()
    wanted = {k: p for k, p in frozen.items() if p.requires_grad}
    compare(golden, {"x": x, **wanted, **factors(model)}, modes)


def attention_parts(prefix: str, attention: nn.Module) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    frozen, modes = {}, {}
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        leaf = getattr(attention, name)
        frozen |= linear(prefix, f"_{letter}", leaf)
        modes[f"{prefix}mode_{letter}"] = mode(leaf)
    return frozen, modes


def additive(keep: Tensor, value: float) -> Tensor:
    assert torch.equal(keep, keep.round()), "a mask holds 0 and 1"
    return ((1.0 - keep.double()) * value)[:, None, None, :]


@checks("aurora/text_self_attn*", "aurora/text_cross_attn*")
def text_attention(golden: Golden) -> None:
    golden.tolerance = 1e-10
    model, layer = text(golden, int(golden.number("n_heads")), hidden=8)
    cross = "enc" in golden
    attention = (layer.crossattention if cross else layer.attention).self
    frozen, modes = attention_parts("", attention)
    load(golden, model, frozen | modes)
    leaves = {"x": golden.tensor("x", requires_grad=True), **factors(model), **modes}
    states, mask, condition, similarity = None, None, Condition(), None
    if cross:
        states = leaves["enc"] = golden.tensor("enc", requires_grad=True)
    if "key_mask" in golden:
        mask = additive(golden.tensor("key_mask"), -10000.0)
    if "enc_mask" in golden:
        mask = additive(golden.tensor("enc_mask"), torch.finfo(torch.float64).min)
    if "frame_sim" in golden:
        similarity = golden.tensor("frame_sim", requires_grad=True)
        condition = Condition(frame_weights=frame_weights(similarity))
    with conditioned(condition):
        if cross:
            out = attention(leaves["x"], encoder_hidden_states=states, encoder_attention_mask=mask)[0]
        else:
            out = attention(leaves["x"], attention_mask=mask)[0]
    golden.same("out", out)
    (out * golden.tensor("cotangent")).sum().backward()
    compare(golden, leaves, {})
    if similarity is not None:
        assert similarity.grad is None, "frames are weighted without gradient"
        if "grad_frame_sim" in golden:
            golden.same("grad_frame_sim", torch.zeros_like(similarity))


def layer_parts(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    """Frozen and trained arrays of a whole text layer."""
    frozen: dict[str, Tensor] = {}
    trained: dict[str, nn.Parameter] = {}
    for prefix, block in (("self_", layer.attention), ("cross_", layer.crossattention)):
        some, modes = attention_parts(prefix, block.self)
        frozen |= some | linear(prefix, "_out", block.output.dense) | norm(f"{prefix}ln", block.output.LayerNorm)
        trained |= modes
    frozen |= linear("ffn_", "1", layer.intermediate.dense) | linear("ffn_", "2", layer.output.dense)
    frozen |= norm("ffn_ln", layer.output.LayerNorm)
    return frozen, trained | dict(gates(layer))


def gates(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    own = layer.output.LayerNorm.aurora_gates["default"]
    for side in ("self", "cross"):
        for what in ("scale", "shift"):
            yield f"gate_{what}_{side}", getattr(own, f"{side}_{what}")


@checks("aurora/text_layer*")
def text_layer(golden: Golden) -> None:
    golden.tolerance = 1e-10
    model, layer = text(golden, int(golden.number("n_heads")), hidden=golden.array("ffn_w1").shape[0])
    frozen, trained = layer_parts(layer)
    load(golden, model, frozen | trained)
    mask = additive(golden.tensor("key_mask"), -10000.0)
    for multimodal in (True, False):
        model.zero_grad()
        leaves = {"x": golden.tensor("x", requires_grad=True), **factors(model), **trained}
        leaves["enc"] = golden.tensor("enc", requires_grad=True)
        out = layer(leaves["x"], leaves["enc"] if multimodal else None, mask)
        golden.same("out_multimodal" if multimodal else "out_text", out)
        (out * golden.tensor("cotangent")).sum().backward()
        compare(golden, leaves, {}, "" if multimodal else "_textmode")


@checks("aurora/context_enhancement*")
def context(golden: Golden) -> None:
    golden.tolerance = 1e-10
    text_states, fused = golden.tensor("text_states", True), golden.tensor("fused_states", True)
    out, negative = context_enhancement(fused, fused, text_states, "official")
    assert negative is fused, "pairs that do not match are left as they are"
    assert torch.equal(out, add_context(fused, text_states))
    golden.same("out", out)
    (out * golden.tensor("cotangent")).sum().backward()
    golden.same("grad_text_states", text_states.grad)
    golden.same("grad_fused_states", fused.grad)
