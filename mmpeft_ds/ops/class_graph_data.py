"""The class graph as torch_geometric sees it: three kinds of nodes, an edge list for each relation."""

# C classes, D width, E edges

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mmpeft_ds.ops.class_graph import ClassGraph
from mmpeft_ds.ops.class_relations import RELATIONS, Relation

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData


def hetero_data(graph: ClassGraph, nodes: dict[str, Tensor], relations: dict[str, Relation] = RELATIONS) -> HeteroData:
    """Edge lists of a whole class graph; edges of weight 0 (removed, or left out by top-k) are absent.

    A message of relation r is act((self_weight x_receiver + sum over edges of edge_weight x_sender) W), without the
    self part for `vv`; what is sent along `np` is the updated negated text.

    Args:
        graph: of all classes.
        nodes: `positive`, `negative`, `visual` (C, D), as far as relations name them.

    Returns:
        data[kind].x (C, D); data[sender, relation, receiver] with edge_index (2, E) int64, row 0 the sender;
        edge_weight (E,) normalised; cosine (E,) with its sign; data[receiver] with self_weight_RELATION (C,). The
        last is kept with the nodes, because transforms treat every entry of an edge store as one value per edge.
    """
    from torch_geometric.data import HeteroData  # seconds to import

    data = HeteroData()
    for kind, x in nodes.items():
        data[kind].x = x
    for name, weights in graph.weights.items():
        relation = relations[name]
        receiver, sender = weights.nonzero(as_tuple=True)
        edges = data[relation.sender, name, relation.receiver]
        edges.edge_index = weights.nonzero().T.flip(0).contiguous()
        edges.edge_weight = graph.edges[name][receiver, sender]
        edges.cosine = weights[receiver, sender]
        data[relation.receiver][f"self_weight_{name}"] = graph.self_weight[name]
    return data
