"""A linear map's output plus a low-rank path whose factors a graph of nodes writes, as one function with its gradient
written out."""

# N rows, I and O widths of the path's input and output, W of the map's output, r rank, R relations, n = 2 nodes,
# k width of a node

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.beside_linear import Onto, add_product, input_gradient, split


class Graph(NamedTuple):
    """The graph of `node_mix`, whose first node writes `down` and whose second writes `up`."""

    node: Tensor  # (n, k)
    relation_weight: Tensor  # (R, k, k)
    relation_bias: Tensor  # (R, k)
    attention_weight: Tensor  # (1, 2 k)
    attention_bias: Tensor  # (1,), without effect: softmax takes it out
    gate_weight: Tensor  # (1, k)
    gate_bias: Tensor  # (1,)
    adjacency: Tensor  # (R, n, n)
    down_weight: Tensor  # (r I, k)
    down_bias: Tensor  # (r I,)
    up_weight: Tensor  # (O r, k)
    up_bias: Tensor  # (O r,)


def plus_written(onto: Onto, x: Tensor, graph: Graph, rank: int, *, start: int = 0, scale: float = 1.0) -> Tensor:
    """The output plus `scale * up down x` at features `start` to `start + O - 1`; all of one dtype.

    Autograd on the plain operations records some thirty small ones, each of which takes as long as the product with
    the map.

    Args:
        onto: the output, (..., W), or the map that makes it of `x`.
        x: (..., I).
        rank: r.

    Returns:
        (..., W). A second derivative is refused. The gradients of the attention's bias and of what it multiplies the
        own node with are zero, and so is that of the adjacency.

    Source: GA-Net, arXiv 2408.00290, the captioner of its published code.
    """
    return _PlusWritten.apply(*split(onto), x, rank, start, scale, *graph)


class _Mixed(NamedTuple):
    """The nodes, and what their gradients need."""

    u: Tensor  # (R, n, k), the nodes under each relation
    share: Tensor  # (R, n, n)
    mixed: Tensor  # (n, k)
    gate: Tensor  # (n, 1)
    nodes: Tensor  # (n, k)


def _mix(graph: Graph) -> _Mixed:
    # Sums of products as in `node_mix`, and less what its softmax takes out.
    k = graph.node.shape[1]
    u = (graph.relation_weight.unsqueeze(1) * graph.node.unsqueeze(1)).sum(-1).add_(graph.relation_bias.unsqueeze(1))
    of_j = (u * graph.attention_weight[0, k:]).sum(-1)
    scores = of_j.unsqueeze(1).expand(graph.adjacency.shape)
    share = scores.masked_fill(graph.adjacency == 0, -1e9).softmax(-1)
    mixed = (share.unsqueeze(-1) * u.unsqueeze(1)).sum((0, 2))
    gate = (mixed * graph.gate_weight).sum(-1, keepdim=True).add_(graph.gate_bias).sigmoid_()
    return _Mixed(u, share, mixed, gate, gate * mixed)


def _unmix(graph: Graph, found: _Mixed, given: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the first seven tensors of `graph` from that of the nodes."""
    k = given.shape[1]
    given_level = torch.ops.aten.sigmoid_backward((given * found.mixed).sum(-1, keepdim=True), found.gate)
    of_mixed = (given * found.gate).addcmul_(given_level, graph.gate_weight)
    given_share = of_mixed @ found.u.mT
    given_scores = torch.ops.aten._softmax_backward_data(given_share, found.share, -1, found.share.dtype)
    if found.share.shape[-1] > 1:
        given_scores = given_scores.masked_fill(graph.adjacency == 0, 0.0)  # of a node without neighbours
    of_j = given_scores.sum(1).unsqueeze(-1)
    given_u = (found.share.mT @ of_mixed).addcmul_(of_j, graph.attention_weight[0, k:])
    attention = torch.zeros_like(graph.attention_weight)
    torch.sum(of_j * found.u, (0, 1), out=attention[0, k:])
    return (
        (given_u @ graph.relation_weight).sum(0),
        given_u.mT @ graph.node,
        given_u.sum(1),
        attention,
        torch.zeros_like(graph.attention_bias),
        given_level.T @ found.mixed,
        given_level.sum(0),
    )


class _PlusWritten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor | None, weight: Tensor | None, bias: Tensor | None, x: Tensor,
        rank: int, start: int, scale: float, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        graph = Graph(*tensors)
        found = _mix(graph)
        first, second = found.nodes
        down = (graph.down_weight * first).sum(-1).add_(graph.down_bias).view(rank, -1)
        up = (graph.up_weight * second).sum(-1).add_(graph.up_bias).view(-1, rank)
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.T
        part = None if len(up) == (len(weight) if out is None else out.shape[-1]) else (start, len(up))
        whole = add_product(out, rows, (weight, bias), inner, up.T, scale, part)
        ctx.save_for_backward(rows, weight, down, up, inner, *found, *graph)
        ctx.part, ctx.scale, ctx.shape = part, scale, x.shape
        return whole.view(*x.shape[:-1], whole.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, inner, *rest = ctx.saved_tensors
        found, graph = _Mixed(*rest[:5]), Graph(*rest[5:])
        of_out, _, _, of_x, *_ = ctx.needs_input_grad
        whole = gradient.reshape(-1, gradient.shape[-1])
        piece = whole if ctx.part is None else whole.narrow(1, *ctx.part)
        given_up = (piece.T @ inner).mul_(ctx.scale).view(1, -1)
        inward = (piece @ up).mul_(ctx.scale)
        given_down = (inward.T @ rows).view(1, -1)
        nodes = torch.cat((given_down @ graph.down_weight, given_up @ graph.up_weight))
        first, second = found.nodes
        given = (
            *_unmix(graph, found, nodes),
            torch.zeros_like(graph.adjacency),
            given_down.T * first,
            given_down[0],
            given_up.T * second,
            given_up[0],
        )
        given_x = input_gradient(whole, weight, inward, down).view(ctx.shape) if of_x else None
        return gradient if of_out else None, None, None, given_x, None, None, None, *given
