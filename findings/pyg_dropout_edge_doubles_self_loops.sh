#!/usr/bin/env bash
# torch_geometric: dropout_edge(force_undirected=True) doubles every self-loop that it keeps.
#
# A good guess: an edge is kept once or not at all: with p=0.5 a node keeps its self-loop in half of the steps.
# What happens: the edges (i, j) with i <= j that are kept are put in, and all of them a second time turned round. A self-loop turned
#   round is itself, so that it stands there twice. In training a node's own message, where its loop is kept,
#   has twice the weight that it has in evaluation. The edge ids that come back name the loop twice as well.
# Source: torch_geometric.utils.dropout_edge (edge_index[row > col] is dropped, then cat([edge_index, edge_index.flip(0)])).
# Who is hurt: graphs to which self-loops were added before edges are dropped, as GCN's normalisation computed beforehand needs.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torch-geometric==2.8.1

observe <<'PY'
import torch
from torch_geometric.utils import add_self_loops, dropout_edge

torch.manual_seed(0)
edges, _ = add_self_loops(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)
seen = {True: set(), False: set()}
for undirected in seen:
    for _ in range(200):
        kept, _ = dropout_edge(edges, p=0.5, force_undirected=undirected)
        loops, others = kept[0] == kept[1], kept[0] != kept[1]
        for which in (loops, others):
            for edge in set(map(tuple, kept[:, which].T.tolist())):
                times = sum(pair == list(edge) for pair in kept.T.tolist())
                seen[undirected].add(("loop" if which is loops else "edge", times))
evaluated, _ = dropout_edge(edges, p=0.5, force_undirected=True, training=False)
print("how often a kept edge stands there: force_undirected", sorted(seen[True]), "| without", sorted(seen[False]))
print("evaluation leaves the edges as they are:", torch.equal(evaluated, edges))
assert seen == {True: {("loop", 2), ("edge", 1)}, False: {("loop", 1), ("edge", 1)}} and torch.equal(evaluated, edges)

# The weight of a node's own message, summed over its neighbours: the mean over many steps, relative to evaluation.
own = sum(int((dropout_edge(edges, p=0.5, force_undirected=True)[0] == 0).all(0).sum()) for _ in range(4000)) / 4000
other = sum(int((dropout_edge(edges, p=0.5, force_undirected=True)[0].T == torch.tensor([0, 1])).all(1).sum()) for _ in range(4000)) / 4000
print(f"mean count in training with p=0.5: edge 0 -> 1 {other:.2f}, loop 0 -> 0 {own:.2f}")
assert abs(other - 0.5) < 0.05 and abs(own - 1.0) < 0.1
PY
