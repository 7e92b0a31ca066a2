"""Encoder models of the routing paper: a tiny RoBERTa in VisionTextEncoder, `get_peft_model`, the task's loss."""

from __future__ import annotations

import peft
import torch
from torch import nn
from transformers import RobertaConfig, ViTConfig

from mmpeft_ds import RoutedAdapterConfig, RoutedLoraConfig
from mmpeft_ds.backbones.vision_text_encoder.model import VisionTextEncoder, VisionTextEncoderConfig
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.tasks.vqa.task import Options, Vqa
from tests.helpers.goldens import Golden, checks

FIXED = {
    "tok_emb": "text_model.embeddings.word_embeddings.weight",
    "pos_emb": "text_model.embeddings.position_embeddings.weight",
    "type_emb": "text_model.embeddings.token_type_embeddings.weight",
    "emb_ln": "text_model.embeddings.LayerNorm",
    "pooler": "text_model.pooler.dense",
    "head1": "head.dense",
    "head_ln": "head.norm",
    "head2": "head.out",
}
IN_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "attn_out": "attention.output.dense",
    "ln_attn": "attention.output.LayerNorm",
    "ffn1": "intermediate.dense",
    "ffn2": "output.dense",
    "ln_ffn": "output.LayerNorm",
}
ADAPTERS = {"attn_adapter": "attention.output.dropout", "ffn_adapter": "output.dropout"}
OF_ADAPTER = {"W_down": "A", "b_down": "down_bias", "W_up": "B", "b_up": "up_bias"}
OWN = ("A", "B", "down_bias", "up_bias")


def path_of(key: str) -> tuple[str, str]:
    """Module path and parameter name of an array `p:key`; `OWN` names are the adapter's."""
    if key in FIXED:
        return FIXED[key].rpartition(".")[0], "weight"
    module, _, name = key.rpartition(".")
    if module in FIXED:
        return FIXED[module], name
    layer, _, part = module.partition(".")
    if part in ADAPTERS:
        return f"text_model.encoder.layer.{layer.removeprefix('layer')}.{ADAPTERS[part]}", OF_ADAPTER[name]
    name = {"W": "weight", "b": "bias"}.get(name, name)
    return f"text_model.encoder.layer.{layer.removeprefix('layer')}.{IN_LAYER[part]}", name


def trained(model: nn.Module, key: str) -> nn.Parameter | None:
    """The parameter that trains in place of array `p:key`: the adapter's own or its copy; None if it is frozen."""
    path, name = path_of(key)
    module = model.get_base_model().get_submodule(path.split(".")[0])
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save["default"].get_submodule(path.partition(".")[2]).get_parameter(name)
    module = model.get_base_model().get_submodule(path)
    for method in ("routed_lora", "routed_adapter"):
        if hasattr(module, f"{method}_norm"):
            return getattr(module, f"{method}_norm")["default"].get_parameter(name)
        if hasattr(module, method) and name != "weight":
            return getattr(module, method)["default"].get_parameter(name)
    return None


def config_of(golden: Golden, method: str, kind: str, heads: tuple[str, ...] = ()) -> peft.PeftConfig:
    """The method as the published scripts configure it."""
    common = dict(
        r=int(golden.number("rank")), route=kind, reshape_compat=True, train_norms=True, modules_to_save=list(heads)
    )
    alpha = golden.number("alpha") if "alpha" in golden else 1.0  # adapters have none, though files of theirs hold it
    return (
        RoutedAdapterConfig(**common)
        if method == "adapter"
        else RoutedLoraConfig(alpha=alpha, train_bias=True, **common)
    )


def build(golden: Golden, prefix: bool) -> VisionTextEncoder:
    """The model with every frozen and initial value of the file."""
    words, width = golden.array("p:tok_emb").shape
    layers = len({k.split(".")[0] for k in golden.arrays if k.startswith("p:layer")})
    text = RobertaConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=int(golden.number("n_heads")),
        intermediate_size=golden.array("p:layer0.ffn1.weight").shape[0],
        max_position_embeddings=golden.array("p:pos_emb").shape[0],
        type_vocab_size=golden.array("p:type_emb").shape[0],
        layer_norm_eps=golden.number("ln_eps"),
        pad_token_id=1,
    )
    vision = ViTConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=width,
        image_size=16,
        patch_size=8,
    )
    config = VisionTextEncoderConfig(
        vision_config=vision,
        text_config=text,
        prefix="pooled" if prefix else "none",
        num_labels=golden.array("logits").shape[1],
        head_multiple=golden.array("p:head1.weight").shape[0] // width,
    )
    model = VisionTextEncoder(config).double().eval()
    assert model.head.norm.eps == golden.number("head_ln_eps")
    with torch.no_grad():
        for key in (k for k in golden.arrays if k.startswith("p:")):
            path, name = path_of(key[2:])
            if name not in OWN:
                model.get_submodule(path).get_parameter(name).copy_(golden.tensor(key))
    return model


@checks("routing/model_encoder_*")
def encoder(golden: Golden) -> None:
    method, _, rest = golden.name.rpartition("model_encoder_")[2].partition("_")
    kind, _, wiring = rest.rpartition("_")
    prefix = wiring == "prefix"
    tokens, mask = golden.tensor("tokens"), golden.tensor("mask")
    assert torch.equal(mask, mask.round()), "a mask holds 0 and 1"
    assert mask.shape[1] == tokens.shape[1] + prefix
    options = config_of(golden, method, kind, VisionTextEncoder.head_modules)
    model = peft.get_peft_model(build(golden, prefix), options)
    names = [k[2:] for k in golden.arrays if k.startswith("p:")]
    with torch.no_grad():
        for key in names:
            if path_of(key)[1] in OWN:
                trained(model, key).copy_(golden.tensor(f"p:{key}"))

    image = golden.tensor("img", requires_grad=True)
    out = model(input_ids=tokens, attention_mask=mask[:, int(prefix) :], image_features=image)
    task = Vqa(Options(loss="bce"), [str(i) for i in range(out.logits.shape[1])])
    batch = PackedBatch(
        sample_id=["a"] * len(tokens),
        weight=torch.ones(len(tokens)),
        images={},
        image_owner=torch.arange(len(tokens)),
        texts={},
        text_owner=torch.arange(len(tokens)),
        targets={"score": golden.tensor("target"), "weight": torch.ones(len(tokens))},
        records=[],
        raw_texts=[],
        bad=[],
    )
    loss = task.loss(out, batch) / task.weight(batch)
    loss.backward()
    golden.same("logits", out.logits)
    golden.same("loss", loss)
    if "grad_img" in golden:
        golden.same("grad_img", image.grad)
    else:
        assert image.grad is None

    want = set(golden.array("trainable").tolist())
    leaves = {key: p for key in names if (p := trained(model, key)) is not None and p.requires_grad}
    assert set(leaves) == want, f"{golden.name}: trainable differ: {set(leaves) ^ want}"
    others = {id(p) for p in model.parameters() if p.requires_grad} - {id(p) for p in leaves.values()}
    assert not others, f"{golden.name}: {len(others)} more parameters train"
    for key, parameter in leaves.items():
        golden.same(f"g:{key}", parameter.grad)
