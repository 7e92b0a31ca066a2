#!/usr/bin/env bash
# torch_geometric: GCNConv on a graph of cosine similarities gives NaN.
#
# A good guess: edge weights may have either sign; the degree is that of the absolute weights, or negative ones are refused.
# What happens: the degree is the signed sum plus 1 for the self-loop, and its inverse square root is taken: NaN below 0, and 0
#   (the node loses even its own features) where the sum is exactly -1. One node's NaN reaches its neighbours.
# Source: torch_geometric.nn.conv.gcn_conv.gcn_norm (deg.pow(-0.5), only infinity is replaced).
# Who is hurt: graphs over samples, prompts or classes weighted by cosine: clean on most batches, NaN on one with enough
#   dissimilar pairs.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
from torch_geometric.nn import GCNConv

conv = GCNConv(1, 1, bias=False)
conv.lin.weight.data.fill_(1.0)
seen = {}
for weight in (-0.4, -1.0, -1.2):
    out = conv(torch.ones(3, 1), torch.tensor([[0, 1], [1, 0]]), torch.tensor([weight, weight]))
    seen[weight] = [round(x, 2) for x in out.flatten().tolist()]
    print(f"nodes 0 and 1 joined with weight {weight}, all features 1: outputs {seen[weight]}")
rows = torch.nn.functional.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=1)
cosine = (rows @ rows.T).fill_diagonal_(0)
edges = cosine.nonzero().T
share = conv(torch.ones(50, 1), edges, cosine[edges[0], edges[1]]).isnan().float().mean().item()
print(f"cosine similarities of 50 random vectors: share of outputs that are NaN {share:.2f}")
assert seen[-0.4] == [1.0, 1.0, 1.0] and seen[-1.0] == [0.0, 0.0, 1.0] and str(seen[-1.2][0]) == "nan" and share > 0.5
PY
