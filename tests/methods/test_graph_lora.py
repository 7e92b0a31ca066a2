"""The caption hyper-network: where it attaches, how large it is, what starts and what learns."""

import peft
import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from mmpeft_ds import GraphLoraConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.graph_lora.method import GraphLoraLinear
from mmpeft_ds.ops.node_graph import node_mix
from tests.helpers.models.tiny_zoo import ZOO, output


def attach(**options):
    torch.manual_seed(3)
    return peft.get_peft_model(ZOO["blip"].build(), GraphLoraConfig(**options))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, GraphLoraLinear)}


def test_blip_large_gets_queries_and_values_of_both_attentions_and_5_5_million_parameters():
    text = {"hidden_size": 768, "encoder_hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        base = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
        model = peft.get_peft_model(base, GraphLoraConfig())
    sizes = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in layers(model).items()}
    assert len(sizes) == 48 and all("text_decoder" in n and n.endswith(("query", "value")) for n in sizes)
    wide = [n for n in sizes if "crossattention" in n and n.endswith("value")]
    assert len(wide) == 12
    assert {sizes[n] for n in wide} == {129_370} and {sizes[n] for n in sizes if n not in wide} == {110_938}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5_546_208


def test_the_default_starts_as_the_frozen_model_and_the_published_start_does_not():
    tiny = ZOO["blip"]
    frozen = output(tiny.build(), tiny)
    assert torch.equal(output(attach(), tiny), frozen)
    assert not torch.equal(output(attach(near_identity=False), tiny), frozen)


def gradients(**options):
    model = attach(near_identity=False, **options)
    output(model, ZOO["blip"]).square().mean().backward()
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found.setdefault(name.rsplit(".", 1)[1], []).append(p.grad)
    return found


def test_with_the_published_adjacency_attention_learns_nothing_and_with_a_dense_one_it_does():
    released, dense = gradients(), gradients(adjacency="dense")
    assert all(not g.any() for g in released["attention_weight"])
    assert all(g.any() for g in dense["attention_weight"])
    for found in (released, dense):
        # It is only asked whether it is 0; a parameter without a gradient would stop DistributedDataParallel.
        assert all(g is not None and not g.any() for g in found["adjacency"])
        rest = [g for key, gs in found.items() if key not in ("adjacency", "attention_weight", "attention_bias")
                for g in gs]  # fmt: skip
        assert all(g.any() for g in rest)


def test_a_node_sees_those_that_its_adjacency_names():
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3), (1, 3, 3), (1, 3), (6,), (1,), (1, 2, 2), (3,), (1,))
    node, weight, bias, attention, shift, _, gate, gate_bias = (torch.randn(s, generator=generator) for s in shapes)
    rest = (weight, bias, attention, shift)
    node.requires_grad_()
    for adjacency, seen in ((torch.eye(2), False), (torch.ones(2, 2), True)):
        out = node_mix(node, *rest, adjacency[None], gate, gate_bias)
        (other,) = torch.autograd.grad(out[0].sum(), node)
        assert bool(other[1].any()) is seen


def test_options_that_cannot_work_are_refused_in_one_line():
    for wrong in ({"r": 0}, {"targets": []}, {"adjacency": "sparse"}, {"relations": 0}):
        with pytest.raises(BadInput) as refused:
            GraphLoraConfig(**wrong)
        assert "\n" not in str(refused.value)
    with pytest.raises(BadInput, match="layers"):
        attach(layers=[9])
