#!/usr/bin/env bash
# torch_geometric: HeteroConv leaves edges out whose relation it has no layer for, without a word.
#
# A good guess: edges of a relation that the layer was not made for are an error, as they are for HGTConv (KeyError).
# What happens: HeteroConv goes over its own layers and skips those that have no edges; edges under any other name, such as a
#   misspelled relation or a reverse relation that the layer lacks, are never looked at. The output is equal to the bit to that without them.
# Source: torch_geometric.nn.HeteroConv.forward.
# Who is hurt: graphs of samples, texts and classes with several relations: one of them carries no message, and training runs on.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
from torch_geometric.nn import HeteroConv, HGTConv, SAGEConv

torch.manual_seed(0)
near, describes, describe = ("image", "near", "image"), ("text", "describes", "image"), ("text", "describe", "image")
nodes = {"image": torch.randn(3, 8), "text": torch.randn(2, 8)}
edges = torch.tensor([[0, 1], [1, 2]])
layer = HeteroConv({near: SAGEConv((8, 8), 8), describes: SAGEConv((8, 8), 8), ("image", "shows", "text"): SAGEConv((8, 8), 8)})
right = layer(nodes, {near: edges, describes: edges})["image"]
wrong = layer(nodes, {near: edges, describe: edges})["image"]
without = layer(nodes, {near: edges})["image"]
print("HeteroConv, relation misspelled: output equal to that without its edges:", torch.equal(wrong, without))
assert torch.equal(wrong, without) and not torch.allclose(right, without)
try:
    HGTConv(8, 8, (["image", "text"], [near, describes]))(nodes, {near: edges, describe: edges})
except KeyError as error:
    print("HGTConv with the same edges: KeyError", error)
else:
    raise SystemExit("HGTConv took them as well")
PY
