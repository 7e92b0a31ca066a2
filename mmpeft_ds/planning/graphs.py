"""Graphs over the samples of all ranks without numbers: the same messages and tensors, edges in an assumed number.

Which samples are neighbours is decided by their features; what is sent is not, and what is held depends on their
number alone.
"""

# B rows of this rank, M rows of all ranks, E edges, k neighbours

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.distributed.batch_graph import Graph
from mmpeft_ds.distributed.counters import counted
from mmpeft_ds.distributed.gather import gather_rows
from mmpeft_ds.distributed.graph_nodes import Nodes
from mmpeft_ds.ops import bits as packed
from mmpeft_ds.ops.similarity_graph import products, symmetric_degrees


def of_threshold(neighbours: float) -> Callable[..., Graph]:
    """`batch_graph.threshold_graph` for samples that have so many neighbours each."""

    def threshold_graph(
        x: Tensor, tau: float, valid: Tensor | None = None, *, exchange: str = "gather", **options: Any
    ) -> Graph:
        nodes = Nodes(x, valid, None, options.get("counts"), options.get("group"), exchange)
        with counted(nodes.traffic):
            total, own = sum(nodes.shares), len(nodes.x)
            edges = round(own * (1 + min(neighbours, total - 1)))
            if nodes.finds_all(exchange):
                ((_, everyone),) = nodes.blocks(exchange)
                degree = (products(everyone, everyone) > tau).sum(1)
                return _graph(nodes, edges, degree, exchange)
            bits = torch.zeros(own, max(1, -(-total // 8)), dtype=torch.uint8, device=x.device)
            for mine, block in nodes.blocks(exchange):
                products(mine, block)
            everyone = gather_rows(bits, nodes.shares, options.get("group"))
            packed.unpack(everyone[:own])
            packed.unpack(everyone[:, : -(-own // 8)])
            degree = symmetric_degrees(everyone)
        return _graph(nodes, edges, degree, exchange)

    return threshold_graph


def of_neighbours(
    x: Tensor,
    k: int,
    tau: float | None = None,
    valid: Tensor | None = None,
    key: Tensor | None = None,
    direction: str = "to_neighbour",
    symmetric: bool = False,
    *,
    released: bool = False,
    exchange: str = "gather",
    **options: Any,
) -> Graph:
    """`batch_graph.knn_graph` where all k neighbours of each sample are similar enough."""
    nodes = Nodes(x, valid, key, options.get("counts"), options.get("group"), exchange)
    total, own, whole = sum(nodes.shares), len(nodes.x), nodes.finds_all(exchange)
    with counted(nodes.traffic):
        for mine, block in nodes.blocks(exchange):
            products(block if whole else mine, block).topk(min(k + 1, len(block)))
        searched, kept = total if whole else own, min(k, max(1, total - 1))
        lists = torch.zeros(searched, kept, dtype=torch.int32, device=x.device)
        neighbours = lists if whole else gather_rows(lists, nodes.shares, options.get("group"))
    ends = torch.zeros(neighbours.numel() * (1 + symmetric) + total, dtype=torch.int64, device=x.device)
    degree = ends.new_zeros(total).index_add_(0, ends, torch.ones_like(ends))
    return _graph(nodes, own * (neighbours.shape[1] * (1 + symmetric) + 1), degree, exchange, released)


def _graph(nodes: Nodes, edges: int, degree: Tensor, exchange: str, repeated: bool = False) -> Graph:
    # Ends among the valid rows, which are there until those among all rows are.
    ends = torch.zeros(2, edges, dtype=torch.int64, device=degree.device)
    return Graph(
        source=ends[0].clone(),
        target=ends[1] - nodes.offset,
        weight=ends[0].double(),
        counts=nodes.counts,
        valid=nodes.valid,
        in_degree=degree.new_zeros(len(nodes.valid)),
        out_degree=degree.new_zeros(sum(nodes.counts)),
        group=nodes.group,
        exchange=exchange,
        traffic=nodes.traffic,
        repeated=repeated,
    )


def adjacency(self: Graph, dtype: torch.dtype, rank: int | None = None) -> Tensor:
    """`Graph.adjacency` with the tensors of a sparse matrix; the product is counted as that of a dense one, without
    the memory of a dense matrix."""
    if (dtype, rank) not in self._adjacency:
        columns = self.num_sources if rank is None else self.counts[rank]
        source = self.source if rank is None else self.source.clone()  # a part of them has numbers of its own
        held = [source, self.weight.to(dtype), self.valid.new_zeros(self.num_targets + 1).long()]
        self._adjacency[dtype, rank] = Sparse(self.num_targets, columns, held)
    return self._adjacency[dtype, rank]


def aggregated(self: Any, matrix: Sparse, x: Tensor) -> Tensor:
    """`GraphConv._pass`: all messages and their sums."""
    return (matrix @ x.to(matrix.dtype)).to(x.dtype)


class Sparse:
    """A sparse matrix of n x m without numbers.

    Attributes:
        held: the tensors that it would consist of.
    """

    def __init__(self, rows: int, columns: int, held: list[Tensor]):
        self.rows, self.columns, self.held, self.dtype = rows, columns, held, held[1].dtype

    def __matmul__(self, x: Tensor) -> Tensor:
        """(rows, F) from (columns, F), with gradient."""
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Sparse) -> Tensor:
        ctx.columns, ctx.held = len(x), matrix.held
        return x.new_empty(matrix.rows, x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # The transposed matrix is sorted by its rows on the way: indices of both dimensions before and after, and the
        # order and the numbers that are sorted; values once more.
        source, weight, _ = ctx.held
        sorting = [weight.clone(), *(source.new_zeros(2, len(source)) for _ in range(3))]
        back = gradient.new_empty(ctx.columns, gradient.shape[1])
        del sorting
        return back, None
