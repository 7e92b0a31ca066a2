#!/usr/bin/env bash
# torch_geometric: NormalizeFeatures subtracts the smallest number of the whole matrix before it divides rows by their sums.
#
# A good guess: as its one line of documentation says, rows are divided so that they sum up to one.
# What happens: the minimum over all nodes is subtracted first. A node's result depends on the other nodes of the graph, and
#   for embeddings, which have negative numbers, directions change: here two opposite vectors come out with a positive cosine.
# Source: torch_geometric.transforms.NormalizeFeatures.forward.
# Who is hurt: graphs over features of CLIP, SigLIP or BERT: cosine similarities after the transform are near 1 for all pairs.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
import torch_geometric.transforms as T
from torch_geometric.data import Data

torch.manual_seed(0)
x = torch.randn(200, 64)
x[1] = -x[0]
cosine = lambda rows: torch.cosine_similarity(rows[0], rows[1], dim=0).item()
alone = T.NormalizeFeatures()(Data(x=x[:2].clone())).x
among = T.NormalizeFeatures()(Data(x=x.clone())).x
print(f"two opposite vectors, cosine {cosine(x):.2f}; after NormalizeFeatures alone {cosine(alone):.2f}, among 200 nodes "
      f"{cosine(among):.2f}; row sums {among.sum(1)[:2].tolist()}")
assert cosine(x) < -0.99 and cosine(among) > 0.8 and abs(cosine(alone) - cosine(among)) > 0.05
PY
