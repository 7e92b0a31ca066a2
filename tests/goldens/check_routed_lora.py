"""Layer files of routed LoRA: a tiny BERT or GPT-2 from transformers, `get_peft_model`, one wrapped projection."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from mmpeft_ds import RoutedLoraConfig
from mmpeft_ds.sites.condition import Condition, conditioned
from tests.helpers.goldens import Golden, checks

NAMES = {  # file -> adapter parameter
    "A": "A",
    "A_qv": "A",
    "B_qv": "B",
    "Bm": "B",
    "A_text": "A_text",
    "A_img": "A_image",
    "U_text": "U_text",
    "U_img": "U_image",
    "U": "U",
    "ln_w": "norm_weight",
    "ln_b": "norm_bias",
    "Wq": "W_q",
    "Wk": "W_k",
    "Wv": "W_v",
    "Wo": "W_out",
    "b": "bias",
}

SOURCES = {"self_pooled": "self_mean", "self_tokens": "self", "cross_pooled": "cross_mean", "cross_tokens": "cross"}


def bert(width: int, cross: bool = False) -> tuple[nn.Module, str]:
    config = BertConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=1, intermediate_size=2 * width, vocab_size=8,
        is_decoder=cross, add_cross_attention=cross,
    )  # fmt: skip
    block = "crossattention" if cross else "attention"
    return BertModel(config).double().eval(), f"encoder.layer.0.{block}.self.query"


def gpt2(width: int) -> tuple[nn.Module, str]:
    config = GPT2Config(n_embd=width, n_layer=1, n_head=1, vocab_size=8, bos_token_id=0, eos_token_id=0)
    return GPT2Model(config).double().eval(), "h.0.attn.c_attn"


def layer(golden: Golden, model: nn.Module, path: str, **options: object) -> nn.Module:
    """The projection at `path`, frozen weights and adapter filled from the file."""
    projection = model.get_submodule(path)
    with torch.no_grad():
        if "b" in golden:
            projection.weight.copy_(golden.tensor("W_in_out" if "W_in_out" in golden else "W"))
            projection.bias.copy_(golden.tensor("b"))
        else:  # the file holds what is added alone
            projection.weight.zero_()
            projection.bias.zero_()
    config = RoutedLoraConfig(
        r=int(golden.number("rank")), alpha=golden.number("alpha"), train_bias="b" in golden, **options
    )
    wrapped = peft.get_peft_model(model, config).get_base_model().get_submodule(path)
    adapter = wrapped.routed_lora["default"]
    with torch.no_grad():
        for key, name in NAMES.items():
            if key in golden and key != "b":
                getattr(adapter, name).copy_(golden.tensor(key))
    assert not wrapped.base_layer.weight.requires_grad
    return wrapped


def compare(golden: Golden, prefix: str, wrapped: nn.Module, out: Tensor, inputs: dict[str, Tensor]) -> None:
    """Output, loss and every gradient of one case."""
    loss = (out * golden.tensor("cotangent")).sum()
    loss.backward()
    golden.same(f"{prefix}out", out)
    golden.same(f"{prefix}loss", loss)
    adapter = wrapped.routed_lora["default"]
    trained = {key: getattr(adapter, name, None) for key, name in NAMES.items() if key in golden}
    for key, leaf in {**inputs, **trained}.items():
        # What a case does not use has no array, and must have no gradient.
        if f"{prefix}grad_{key}" in golden:
            golden.same(f"{prefix}grad_{key}", leaf.grad)
        else:
            assert leaf.grad is None or not leaf.grad.any(), f"{golden.name}: {prefix}{key} has a gradient"


@checks("routing/lora_separate_*", "routing/lora_fused_*")
def lora(golden: Golden) -> None:
    fused = "fused" in golden.name
    variant = "after_up" if "after_up" in golden.name else "plain"
    width = golden.array("x").shape[-1]

    def run(kind: str, reshape_compat: bool) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
        model, path = gpt2(width) if fused else bert(width)
        wrapped = layer(golden, model, path, route=kind, reshape_compat=reshape_compat, variant=variant)
        inputs = {"x": golden.tensor("x", True), "y": golden.tensor("y", True)}
        with conditioned(Condition(inputs["y"])):
            return wrapped, wrapped(inputs["x"]), inputs

    for kind in golden.cases():
        wrapped, out, inputs = run(kind, reshape_compat=True)
        compare(golden, f"{kind}__", wrapped, out, inputs)
        for suffix, compat in (("out_if_reshape", True), ("out_if_true_transpose", False)):
            if f"{kind}__{suffix}" in golden:
                golden.same(f"{kind}__{suffix}", run(kind, compat)[1])


@checks("routing/split_*")
def split(golden: Golden) -> None:
    name = golden.name.rpartition("/")[2]
    variant = "split" if not name.startswith("split_merge") else "split_merge_ln" if "ln" in name else "split_merge"
    model, path = (gpt2 if "fused" in name else bert)(golden.array("x").shape[-1])
    wrapped = layer(golden, model, path, route="matmul1", variant=variant, reshape_compat=True)
    inputs = {"x": golden.tensor("x", True), "y": golden.tensor("y", True)}
    with conditioned(Condition(inputs["y"])):
        compare(golden, "", wrapped, wrapped(inputs["x"]), inputs)


@checks("routing/bottleneck_crossattn_*")
def cross_attention(golden: Golden) -> None:
    fused = "fused" in golden.name
    model, path = (gpt2 if fused else bert)(golden.array("x").shape[-1])
    wrapped = layer(golden, model, path, variant="cross_attention")
    inputs = {"x": golden.tensor("x", True), "y": golden.tensor("y", True)}
    with conditioned(Condition(inputs["y"])):
        compare(golden, "", wrapped, wrapped(inputs["x"]), inputs)


@checks("routing/encdec_lora_*")
def encoder_decoder(golden: Golden) -> None:
    kind = golden.name.rpartition("encdec_lora_")[2]
    for case in golden.cases():
        model, path = bert(golden.array("x").shape[-1], cross=case.startswith("cross"))
        wrapped = layer(golden, model, path, route=kind, reshape_compat=True, condition=SOURCES[case])
        inputs = {"x": golden.tensor("x", True), "enc": golden.tensor("enc", True)}
        masks = {key: golden.tensor(key).bool() for key in ("keep_mask", "enc_keep_mask")}
        condition = Condition(own_mask=masks["keep_mask"], encoder=inputs["enc"], encoder_mask=masks["enc_keep_mask"])
        with conditioned(condition):
            compare(golden, f"{case}__", wrapped, wrapped(inputs["x"]), inputs)
