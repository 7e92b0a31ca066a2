#!/usr/bin/env bash
# torch_geometric: a tensor with one row per receiver, kept in an edge store, is an edge attribute when the counts agree.
#
# A good guess: what belongs to an edge is told by its name or stays what it was; a transform treats an attribute alike in
#   all graphs of a data set.
# What happens: any tensor of an edge store whose length equals the number of edges is an edge attribute, whatever it means.
#   A weight per receiving node is cut by subgraph() along the edges, and copied into the reverse relation, in graphs with as
#   many edges as receivers; in all others it is left as it was, now belonging to nodes that may be gone.
# Source: torch_geometric.data.storage.EdgeStorage.is_edge_attr (the sizes alone decide).
# Who is hurt: heterogeneous graphs that keep per-class or per-receiver numbers beside edge_index: wrong in some graphs only.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
import torch_geometric.transforms as T
from torch_geometric.data import HeteroData

seen = {}
for edges in (3, 4):
    graph = HeteroData()
    graph["text"].x, graph["class"].x = torch.randn(5, 2), torch.randn(3, 2)
    store = graph["text", "to", "class"]
    store.edge_index = torch.tensor([[0, 1, 2, 3], [2, 1, 0, 0]])[:, :edges]
    store.receiver_weight = torch.tensor([10.0, 11.0, 12.0])
    part = graph.subgraph({"text": torch.tensor([0, 1])})["text", "to", "class"]
    reverse = T.ToUndirected()(graph.clone())["class", "rev_to", "text"]
    seen[edges] = (store.is_edge_attr("receiver_weight"), part.receiver_weight.tolist(), "receiver_weight" in reverse)
    print(f"3 classes, {edges} edges: the weight per class counts as an edge attribute: {seen[edges][0]}; after a subgraph of "
          f"two texts: {seen[edges][1]}; copied into the reverse relation: {seen[edges][2]}")
assert seen == {3: (True, [10.0, 11.0], True), 4: (False, [10.0, 11.0, 12.0], False)}, seen
PY
