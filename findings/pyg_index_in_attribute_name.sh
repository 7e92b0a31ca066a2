#!/usr/bin/env bash
# torch_geometric: attributes whose names hold "index" or "batch" are counted up when graphs are batched.
#
# A good guess: tensors are concatenated as they are; edge_index is the exception, since it holds node numbers.
# What happens: class_index, label_index, image_index get the node count of the graphs before them added (labels out of
#   range, or of another class), names with "batch" the running maximum plus one; and tensors with "index" in the name are
#   joined along their last dimension, so that two token_index of shape (2, 3) become (2, 6). to_data_list() subtracts again,
#   so a round trip shows nothing.
# Source: torch_geometric.data.Data.__inc__ and __cat_dim__.
# Who is hurt: labels and look-up numbers kept in Data objects: the loss is computed against shifted classes.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
from torch_geometric.data import Batch, Data

graphs = [Data(x=torch.randn(4, 2), edge_index=torch.tensor([[0], [1]]), label=torch.tensor([i]), class_index=torch.tensor([i]),
               batch_mean=torch.tensor([7]), token_index=torch.zeros(2, 3, dtype=torch.long)) for i in range(3)]
batch = Batch.from_data_list(graphs)
seen = {name: batch[name].tolist() for name in ("label", "class_index", "batch_mean")}
shape = tuple(batch.token_index.shape)
back = [graph.class_index.item() for graph in batch.to_data_list()]
print(f"three graphs of 4 nodes, both `label` and `class_index` 0, 1, 2: in the batch {seen}; token_index of shape (2, 3): {shape}")
print("class_index after to_data_list():", back)
assert seen == {"label": [0, 1, 2], "class_index": [0, 5, 10], "batch_mean": [7, 15, 23]} and shape == (2, 9) and back == [0, 1, 2]
PY
