#!/usr/bin/env bash
# torch_geometric: GATConv between two kinds of nodes joins node i of one kind to node i of the other.
#
# A good guess: self-loops are for graphs with one kind of node; given (x_source, x_target) there are none to add.
# What happens: add_self_loops=True, the default, adds the edges 0-0, 1-1, ... up to the smaller node count. A receiver
#   attends to an unrelated sender that happens to have its number, and one without any edge gets a message.
# Source: torch_geometric.nn.conv.gat_conv.GATConv.forward (and GATv2Conv): add_self_loops over min(size).
# Who is hurt: HeteroConv models of texts, pictures and classes: results depend on the order of the nodes.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
from torch_geometric.nn import GATConv, GATv2Conv

texts, classes, edge = torch.randn(5, 4), torch.randn(2, 4), torch.tensor([[3], [0]])
for conv in (GATConv, GATv2Conv):
    torch.manual_seed(0)
    _, (used, weights) = conv((4, 4), 3)((texts, classes), edge, return_attention_weights=True)
    pairs = list(zip(used[0].tolist(), used[1].tolist(), [round(w, 2) for w in weights.flatten().tolist()]))
    print(f"{conv.__name__}, one edge from text 3 to class 0: (text, class, attention) used: {pairs}")
    assert [pair[:2] for pair in pairs] == [(3, 0), (0, 0), (1, 1)]
PY
