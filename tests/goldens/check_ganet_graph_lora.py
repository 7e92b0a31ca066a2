"""The caption hyper-network of GA-Net, on a decoder layer of BLIP's own class."""

from __future__ import annotations

import peft
import torch
from torch import nn
from transformers import BertConfig, BertModel

from mmpeft_ds import GraphLoraConfig
from mmpeft_ds.methods.graph_lora.method import GraphLoraLinear
from tests.helpers.goldens import Golden, checks

NAMES = {  # file -> parameter; what the file writes with a leading 1 is stored so too, or viewed
    "node": "node",
    "att_w": "attention_weight",
    "att_b": "attention_bias",
    "gate_w": "gate_weight",
    "gate_b": "gate_bias",
    "GA_w": "down_weight",
    "GA_b": "down_bias",
    "GB_w": "up_weight",
    "GB_b": "up_bias",
}


def wrapped(golden: Golden) -> GraphLoraLinear:
    """The query projection of a one-layer model, whose input and output widths are made those of the file."""
    out, width = golden.tensor("W0").shape
    relations, r = golden.tensor("adj").shape[1], golden.tensor("LA").shape[0]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, vocab_size=8)).eval()
    projection = nn.Linear(width, out)
    model.encoder.layer[0].attention.self.query = projection
    model.double()
    with torch.no_grad():
        projection.weight.copy_(golden.tensor("W0"))
        projection.bias.copy_(golden.tensor("b0"))
    node_width = golden.tensor("node").shape[-1]
    config = GraphLoraConfig(r=r, node_width=node_width, relations=relations, targets=["q"])
    return peft.get_peft_model(model, config).get_base_model().encoder.layer[0].attention.self.query


@checks("ganet/graph_lora*")
def graph_lora(golden: Golden) -> None:
    layer = wrapped(golden)
    (written,) = layer.graph_lora["default"]
    relations = range(len(written.relation_weight))
    with torch.no_grad():
        for key, name in NAMES.items():
            parameter = getattr(written, name)
            parameter.copy_(golden.tensor(key).view_as(parameter))
        for r in relations:
            written.relation_weight[r].copy_(golden.tensor(f"rel{r}_w"))
            written.relation_bias[r].copy_(golden.tensor(f"rel{r}_b"))
        # the default adjacency is what the file has
        assert torch.equal(written.adjacency, golden.tensor("adj")[0])

    x = golden.tensor("x", requires_grad=True)
    out = layer(x)
    (out * golden.tensor("G")).sum().backward()
    golden.same("out", out)
    golden.same("dx", x.grad)
    down, up = written.factors()
    golden.same("LA", down)
    golden.same("LB", up)
    golden.same("node_out", written.nodes()[None])
    for key, name in NAMES.items():
        golden.same(f"d{key}", getattr(written, name).grad.view_as(golden.tensor(key)))
    for r in relations:
        golden.same(f"drel{r}_w", written.relation_weight.grad[r])
        golden.same(f"drel{r}_b", written.relation_bias.grad[r])
    # published as a parameter that nothing changes
    assert not written.adjacency.grad.any()
    written.reset(GraphLoraConfig(adjacency="dense", r=written.r, node_width=written.node.shape[1]))
    assert written.adjacency.min() == 1
    with torch.no_grad():
        for key, name in NAMES.items():
            parameter = getattr(written, name)
            parameter.copy_(golden.tensor(key).view_as(parameter))
        for r in relations:
            written.relation_weight[r].copy_(golden.tensor(f"rel{r}_w"))
            written.relation_bias[r].copy_(golden.tensor(f"rel{r}_b"))
    golden.same("node_out_dense_adj", written.nodes()[None])
