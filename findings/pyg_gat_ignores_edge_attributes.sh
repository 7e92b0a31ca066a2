#!/usr/bin/env bash
# torch_geometric: GATConv without edge_dim takes edge attributes and does not look at them.
#
# A good guess: attention gets the weights that are handed to it, or an error says that edge_dim is missing, as in GATv2Conv.
# What happens: the output is equal to the bit with weights, with other weights and without any; weights of any width are taken.
# Source: torch_geometric.nn.GATConv.edge_update (edge_attr counts only where lin_edge is there, and lin_edge is made
#   from edge_dim); GATv2Conv.edge_update asserts instead.
# Who is hurt: graphs whose edges carry similarities: they train, and the similarities have no effect.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
from torch_geometric.nn import GATConv, GATv2Conv

torch.manual_seed(0)
nodes, edges = torch.randn(3, 4), torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]])
layer = GATConv(4, 4)
without = layer(nodes, edges)
for width in (1, 7):
    same = torch.equal(layer(nodes, edges, 100 * torch.rand(4, width)), without)
    print(f"GATConv(4, 4), edge_attr of width {width}: output equal to that without: {same}")
    assert same
told = GATConv(4, 4, edge_dim=1)
assert not torch.equal(told(nodes, edges, torch.rand(4, 1)), told(nodes, edges))
print("GATConv(4, 4, edge_dim=1): the output depends on edge_attr")
try:
    GATv2Conv(4, 4)(nodes, edges, torch.rand(4, 1))
except AssertionError:
    print("GATv2Conv(4, 4) with edge_attr: AssertionError")
else:
    raise SystemExit("GATv2Conv took edge_attr as well")
PY
