#!/usr/bin/env bash
# torch_geometric: nn.LayerNorm as it is made normalises all nodes together, so a node's output depends on the other nodes.
#
# A good guess: torch_geometric.nn.LayerNorm(D) is torch.nn.LayerNorm(D) over the rows of a node matrix.
# What happens: mode is "graph" unless told otherwise: one mean and one deviation over all numbers of all nodes (of each graph,
#   where `batch` is given). Another batch around a sample changes its output; rows do not have mean 0. mode="node" is torch's.
# Source: torch_geometric.nn.LayerNorm.forward.
# Who is hurt: graphs over a batch of samples (the layer makes training depend on batch size and rank count, and a
#   prediction on what else is in the batch), and ports of torch code that only change the import.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
import torch_geometric.nn as pyg

torch.manual_seed(0)
nodes = torch.randn(5, 8) * torch.tensor([1.0, 1.0, 1.0, 1.0, 20.0])[:, None]
alone, among = nodes[:4], nodes
graph, node, plain = pyg.LayerNorm(8), pyg.LayerNorm(8, mode="node"), torch.nn.LayerNorm(8)
change = (graph(among)[:4] - graph(alone)).abs().max().item()
mean = graph(alone).mean(dim=1).abs().max().item()
print(f"LayerNorm(8): a fifth node changes the first four outputs by up to {change:.2f}; largest mean of a row {mean:.2f}")
assert change > 0.5 and mean > 0.1
assert torch.allclose(node(among), plain(among), atol=1e-5) and torch.allclose(node(among)[:4], node(alone))
print('LayerNorm(8, mode="node"): equal to torch.nn.LayerNorm(8), the fifth node changes nothing')
PY
