#!/usr/bin/env bash
# torch_geometric: to_undirected on a graph that is undirected already doubles its edge weights.
#
# A good guess: making a symmetric graph symmetric changes nothing.
# What happens: every edge meets its own mirror image, and the weights of the two are added (reduce="add"); a loop's too.
#   In a graph of which some edges already have their opposite, only those are doubled. T.ToUndirected does the same.
# Source: torch_geometric.utils.to_undirected, coalesce with reduce="add".
# Who is hurt: similarity graphs: similarities above 1, mutual neighbours weighted twice against one-sided ones.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
import torch_geometric.transforms as T
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

edges, weights = torch.tensor([[0, 1, 1], [1, 0, 2]]), torch.tensor([0.5, 0.5, 0.5])
both, summed = to_undirected(edges, weights)
_, mean = to_undirected(edges, weights, reduce="mean")
transformed = T.ToUndirected()(Data(edge_index=edges, edge_attr=weights, num_nodes=3)).edge_attr
print("edges 0-1 (both ways) and 1-2 (one way), all of weight 0.5; after to_undirected:",
      dict(zip(zip(*both.tolist()), summed.tolist())))
print("with reduce='mean':", mean.tolist(), "by T.ToUndirected:", transformed.tolist())
assert summed.tolist() == [1.0, 1.0, 0.5, 0.5] == transformed.tolist() and mean.tolist() == [0.5] * 4
PY
