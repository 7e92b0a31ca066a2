"""Decoder models of the routing paper: a tiny GPT-2 in VisionTextDecoder, `get_peft_model`, the backbone's labels and
the captioning task's loss."""

from __future__ import annotations

import peft
import torch
from torch import nn
from transformers import GPT2Config, ViTConfig

from mmpeft_ds.backbones.vision_text_decoder.backbone import ENTRY, labels_of
from mmpeft_ds.backbones.vision_text_decoder.backbone import Options as BackboneOptions
from mmpeft_ds.backbones.vision_text_decoder.model import VisionTextDecoder, VisionTextDecoderConfig
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.tasks.captioning.task import Captioning, Options
from tests.goldens.check_routing_models import OF_ADAPTER, OWN, config_of
from tests.helpers.goldens import Golden, checks

FIXED = {"tok_emb": "wte", "pos_emb": "wpe", "final_ln": "ln_f"}
IN_LAYER = {
    "ln_attn": "ln_1",
    "qkv": "attn.c_attn",
    "attn_out": "attn.c_proj",
    "ln_ffn": "ln_2",
    "ffn1": "mlp.c_fc",
    "ffn2": "mlp.c_proj",
    "adapter": "attn.resid_dropout",
}
NAMES = {"W_in_out": "weight", "b": "bias", "A_qv": "A", "B_qv": "B", **OF_ADAPTER}


def path_of(key: str) -> tuple[str, str]:
    """Module path and parameter name of an array `p:key`; `OWN` names are the adapter's."""
    if key in FIXED:
        return f"text_model.transformer.{FIXED[key]}", "weight"
    module, _, name = key.rpartition(".")
    name = NAMES.get(name, name)
    if module in FIXED:
        return f"text_model.transformer.{FIXED[module]}", name
    layer, _, part = module.partition(".")
    return f"text_model.transformer.h.{layer.removeprefix('layer')}.{IN_LAYER[part]}", name


def trained(model: nn.Module, key: str) -> nn.Parameter | None:
    """The parameter that trains in place of array `p:key`; None if it is frozen."""
    path, name = path_of(key)
    module = model.get_base_model().get_submodule(path)
    for method in ("routed_lora", "routed_adapter"):
        if hasattr(module, f"{method}_norm"):
            return getattr(module, f"{method}_norm")["default"].get_parameter(name)
        if hasattr(module, method) and name != "weight":
            return dict(getattr(module, method)["default"].named_parameters()).get(name)
    return None


def build(golden: Golden, prefix: bool) -> VisionTextDecoder:
    """The model with every frozen and initial value of the file."""
    words, width = golden.array("p:tok_emb").shape
    layers = len({k.split(".")[0] for k in golden.arrays if k.startswith("p:layer")})
    text = GPT2Config(
        vocab_size=words,
        n_embd=width,
        n_layer=layers,
        n_head=int(golden.number("n_heads")),
        n_inner=golden.array("p:layer0.ffn1.b").shape[0],
        n_positions=golden.array("p:pos_emb").shape[0],
        layer_norm_epsilon=golden.number("ln_eps"),
        bos_token_id=words - 1,
        eos_token_id=words - 1,
    )
    sizes = dict(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=width)
    vision = ViTConfig(**sizes, image_size=16, patch_size=8)
    config = VisionTextDecoderConfig(vision_config=vision, text_config=text, prefix="pooled" if prefix else "none")
    model = VisionTextDecoder(config).double().eval()
    with torch.no_grad():
        for key in (k for k in golden.arrays if k.startswith("p:")):
            path, name = path_of(key[2:])
            if name not in OWN:
                model.get_submodule(path).get_parameter(name).copy_(golden.tensor(key))
    return model


@checks("routing/model_decoder_*")
def decoder(golden: Golden) -> None:
    method, _, rest = golden.name.rpartition("model_decoder_")[2].partition("_")
    kind, _, wiring = rest.rpartition("_")
    prefix = wiring == "prefix"
    tokens, mask = golden.tensor("tokens"), golden.tensor("mask")
    assert mask.shape[1] == tokens.shape[1] + prefix
    assert torch.equal(mask, mask.round()) and mask[:, : int(prefix)].all(), "a mask holds 0 and 1, the image counts"
    model = peft.get_peft_model(build(golden, prefix), config_of(golden, method, kind))
    names = [k[2:] for k in golden.arrays if k.startswith("p:")]
    with torch.no_grad():
        for key in names:
            if path_of(key)[1] in OWN:
                trained(model, key).copy_(golden.tensor(f"p:{key}"))

    texts = len(tokens)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    batch = PackedBatch(
        sample_id=["a"] * texts,
        weight=torch.ones(texts),
        images={"image_features": golden.tensor("img", requires_grad=True)},
        image_owner=torch.arange(texts),
        texts={
            "input_ids": tokens,
            "attention_mask": mask[:, int(prefix) :].long(),
            "labels": labels_of(tokens, everything, "official"),
        },
        text_owner=torch.arange(texts),
        targets={},
        records=[],
        raw_texts=[],
        bad=[],
    )
    backbone = ENTRY(BackboneOptions(loss="official", prefix="pooled" if prefix else "none"), None)
    out = model(**backbone.inputs(batch))
    task = Captioning(Options(loss="token"), None)
    loss = task.loss(backbone.read(out, batch), batch) / task.weight(batch)
    loss.backward()
    golden.same("logits", out.logits)
    golden.same("loss", loss)
    image = batch.images["image_features"]
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
