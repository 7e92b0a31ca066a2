"""Graph convolution from the rows of all ranks to those of this rank."""

# B rows of this rank, M rows of all ranks, E edges

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import OptTensor

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.batch_graph import Graph
from mmpeft_ds.distributed.counters import counted
from mmpeft_ds.distributed.gather import gather_rows
from mmpeft_ds.distributed.ring import ring_blocks
from mmpeft_ds.ops.precision import full_dtype


class GraphConv(MessagePassing):
    """`A x W + b` with the weights of the graph as A, its own rows of it alone.

    The narrower side travels: `x W` if the layer shrinks, else `x`, once in a forward pass. All ranks must call it and
    take part in its backward pass, with any number of rows; `x` must need gradient on all or on none.

    Args:
        in_channels, out_channels: widths.
        bias: whether there is b.

    Attributes:
        weight: W [in, out], uniform Glorot at first.
        bias: b [out], zeros at first; None without.

    Source: Kipf and Welling, ICLR 2017; GA-Net, arXiv 2408.00290, section on the graph adapter.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(aggr="sum", node_dim=0)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights again."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """Own rows (B, in) and a `normalised` graph to (B, out). Collective."""
        shrinks = self.in_channels > self.out_channels
        x = x.to(self.weight.dtype)
        x = x @ self.weight if shrinks else x
        with counted(graph.traffic):
            x = self.aggregate_rows(x, graph)
        x = x if shrinks else x @ self.weight
        return x if self.bias is None else x + self.bias

    def aggregate_rows(self, x: Tensor, graph: Graph) -> Tensor:
        """Weighted sums over the edges into own rows: (B, F) of this rank to (B, F), with gradient. Collective."""
        if graph.exchange == "ring" and collectives.world_size(graph.group) > 1:
            blocks = ring_blocks(x, graph.counts, graph.group)
            return sum(self._pass(graph.adjacency(full_dtype(x.dtype), rank), rows) for rank, rows in blocks)
        return self._pass(graph.adjacency(full_dtype(x.dtype)), gather_rows(x, graph.counts, graph.group))

    def _pass(self, adjacency: Tensor, x: Tensor) -> Tensor:
        # propagate_type: (x: Tensor, edge_weight: OptTensor)
        return self.propagate(adjacency, x=x.to(adjacency.dtype), edge_weight=None).to(x.dtype)

    def message(self, x_j: Tensor, edge_weight: OptTensor) -> Tensor:
        """The message of one edge, for tools that propagate an `edge_index` to look at single messages."""
        return x_j if edge_weight is None else edge_weight[:, None] * x_j

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        """All messages and their sums as one sparse product, so that no (E, F) tensor is made."""
        return adj_t @ x
