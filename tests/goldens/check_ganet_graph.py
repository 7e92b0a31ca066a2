"""Graphs and the graph convolution of GA-Net, on one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft_ds.distributed.batch_graph import Graph, knn_graph, normalised, threshold_graph
from mmpeft_ds.distributed.graph_conv import GraphConv
from mmpeft_ds.ops.similarity_graph import Rows, cosines_at, products
from tests.helpers.goldens import Golden, checks

TOLERANCE = 1e-14


def dense(graph: Graph) -> Tensor:
    """(B, M) with the weights of edges that occur twice added."""
    A = torch.zeros(graph.num_targets, graph.num_sources, dtype=torch.float64)
    return A.index_put_((graph.target, graph.source), graph.weight, accumulate=True)


def of_matrix(A: Tensor) -> Graph:
    """The graph of a whole matrix of multiplicities, row = target."""
    assert torch.equal(A, A.round()), "not a matrix of multiplicities"
    target, source = (ends.repeat_interleave(A[A > 0].long()) for ends in (A > 0).nonzero(as_tuple=True))
    degrees = A.sum(1).long(), A.sum(0).long()
    valid = torch.ones(len(A), dtype=torch.bool)
    return Graph(source, target, torch.ones(len(source), dtype=torch.float64), [len(A)], valid, *degrees)


def compare_graph(golden: Golden, case: str, graph: Graph) -> None:
    golden.same(f"{case}_A", dense(graph), 0)
    golden.same(f"{case}_Ahat", dense(normalised(graph, "symmetric")), TOLERANCE)
    apart = graph.source != graph.target
    got = torch.stack([graph.source[apart], graph.target[apart]]).T.tolist()
    want = torch.stack([golden.tensor(f"{case}_src"), golden.tensor(f"{case}_dst")]).T.tolist()
    assert sorted(got) == sorted(want), f"{golden.name}: edges of {case}"


def cases(golden: Golden) -> list[str]:
    return [key.removesuffix("_X") for key in golden.arrays if key.endswith("_X")]


@checks("ganet/graph_threshold*")
def undirected(golden: Golden) -> None:
    for case in cases(golden):
        x = golden.tensor(f"{case}_X")
        for features in (x, x.float()):
            compare_graph(golden, case, threshold_graph(features, golden.number("tau")))
        rows = Rows.of(x)
        golden.same(f"{case}_S", products(rows, rows), TOLERANCE)
        i, j = torch.ones(len(x), len(x)).nonzero(as_tuple=True)
        golden.same(f"{case}_S", cosines_at(rows, rows, i, j).view(len(x), len(x)), TOLERANCE)


@checks("ganet/graph_knn_directed*")
def directed(golden: Golden) -> None:
    k, tau = golden.number("k"), golden.number("tau")
    for case in cases(golden):
        x = golden.tensor(f"{case}_X")
        for features in (x, x.float()):
            for released in (False, True):
                compare_graph(golden, case, knn_graph(features, k, tau, direction="to_neighbour", released=released))


@checks("ganet/graph_conv*")
def convolution(golden: Golden) -> None:
    for case in cases(golden):
        graph = normalised(of_matrix(golden.tensor(f"{case.split('_')[0]}_A")), "symmetric")
        x, W = golden.tensor(f"{case}_X", True), golden.tensor(f"{case}_W")
        conv = GraphConv(*W.shape).double()
        with torch.no_grad():
            conv.weight.copy_(W)
            conv.bias.copy_(golden.tensor(f"{case}_b"))
        y = conv(x, graph)
        (y * golden.tensor(f"{case}_G")).sum().backward()
        found = {"Y": y, "dX": x.grad, "dW": conv.weight.grad, "db": conv.bias.grad}
        for name, tensor in found.items():
            golden.same(f"{case}_{name}", tensor, 1e-13)
