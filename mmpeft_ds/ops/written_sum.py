"""A linear map's output plus a low-rank path whose factors nodes of a graph write, with the gradients written out; and
the nodes of many such graphs at once."""

# N rows, I and O widths of the path's input and output, W of the map's output, r rank, L graphs, R relations,
# n = 2 nodes, k width of a node

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.beside_linear import Onto, add_product, input_gradient, split


class Graph(NamedTuple):
    """The graph of `node_mix`."""

    node: Tensor  # (n, k)
    relation_weight: Tensor  # (R, k, k)
    relation_bias: Tensor  # (R, k)
    attention_weight: Tensor  # (1, 2 k)
    attention_bias: Tensor  # (1,), without effect: softmax takes it out
    gate_weight: Tensor  # (1, k)
    gate_bias: Tensor  # (1,)
    adjacency: Tensor  # (R, n, n)


class Writing(NamedTuple):
    """The maps of the first node to `down` and of the second to `up`."""

    down_weight: Tensor  # (r I, k)
    down_bias: Tensor  # (r I,)
    up_weight: Tensor  # (O r, k)
    up_bias: Tensor  # (O r,)


def mixed_nodes(graphs: Sequence[Graph]) -> tuple[Tensor, ...]:
    """`node_mix` of several graphs of the same sizes: some ten operations forward and twenty backward for all of them,
    each of which takes as long as a product with a small map.

    Returns:
        (n, k) of each graph. A second derivative is refused. The gradients of the attention's bias and of what it
        multiplies the own node with are zero, and so is that of the adjacency; a graph whose nodes got none gets none.

    Source: GA-Net, arXiv 2408.00290, the captioner of its published code.
    """
    return _Mix.apply(len(graphs), *(tensor for of_all in zip(*graphs, strict=True) for tensor in of_all))


class _Mixed(NamedTuple):
    """The nodes, and what their gradients need."""

    u: Tensor  # (L, R, n, k), the nodes under each relation
    share: Tensor  # (L, R, n, n)
    mixed: Tensor  # (L, n, k)
    gate: Tensor  # (L, n, 1)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        graph = Graph(*(torch.stack(tensors[at : at + count]) for at in range(0, len(tensors), count)))
        found = _mix(graph)
        # Not by `save_for_backward`: two losses of one forward may each have a backward pass of their own, through
        # graphs of different layers.
        ctx.graph, ctx.found = graph, found
        ctx.set_materialize_grads(False)
        return (found.gate * found.mixed).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = torch.zeros_like(ctx.graph.node[0])
        gradients = _unmix(ctx.graph, ctx.found, torch.stack([nothing if g is None else g for g in given]))
        of_each = (zip(of_all.unbind(), given, strict=True) for of_all in gradients)
        return None, *(part if g is not None else None for of_all in of_each for part, g in of_all)


def _mix(graph: Graph) -> _Mixed:
    # Sums of products as in `node_mix`, and less what its softmax takes out.
    k = graph.node.shape[-1]
    u = (graph.relation_weight.unsqueeze(2) * graph.node[:, None, :, None]).sum(-1)
    u.add_(graph.relation_bias.unsqueeze(2))
    of_j = (u * graph.attention_weight[:, None, :, k:]).sum(-1)
    scores = of_j.unsqueeze(2).expand(graph.adjacency.shape)
    share = scores.masked_fill(graph.adjacency == 0, -1e9).softmax(-1)
    mixed = (share.unsqueeze(-1) * u.unsqueeze(2)).sum((1, 3))
    gate = (mixed * graph.gate_weight).sum(-1, keepdim=True).add_(graph.gate_bias.unsqueeze(1)).sigmoid_()
    return _Mixed(u, share, mixed, gate)


def _unmix(graph: Graph, found: _Mixed, given: Tensor) -> Graph:
    """Gradients from that of the nodes, (L, n, k)."""
    k = given.shape[-1]
    given_level = torch.ops.aten.sigmoid_backward((given * found.mixed).sum(-1, keepdim=True), found.gate)
    of_mixed = (given * found.gate).addcmul_(given_level, graph.gate_weight).unsqueeze(1)
    given_share = of_mixed @ found.u.mT
    given_scores = torch.ops.aten._softmax_backward_data(given_share, found.share, -1, found.share.dtype)
    if found.share.shape[-1] > 1:
        given_scores = given_scores.masked_fill(graph.adjacency == 0, 0.0)  # of a node without neighbours
    of_j = given_scores.sum(2).unsqueeze(-1)
    given_u = (found.share.mT @ of_mixed).addcmul_(of_j, graph.attention_weight[:, None, :, k:])
    attention = torch.zeros_like(graph.attention_weight)
    attention[:, 0, k:] = (of_j * found.u).sum((1, 2))
    return Graph(
        node=(given_u @ graph.relation_weight).sum(1),
        relation_weight=given_u.mT @ graph.node.unsqueeze(1),
        relation_bias=given_u.sum(2),
        attention_weight=attention,
        attention_bias=torch.zeros_like(graph.attention_bias),
        gate_weight=given_level.mT @ found.mixed,
        gate_bias=given_level.sum(1),
        adjacency=torch.zeros_like(graph.adjacency),
    )


def plus_written(
    onto: Onto, x: Tensor, nodes: Tensor, writing: Writing, rank: int, *, start: int = 0, scale: float = 1.0
) -> Tensor:
    """The output plus `scale * up down x` at features `start` to `start + O - 1`; all of one dtype.

    Args:
        onto: the output, (..., W), or the map that makes it of `x`.
        x: (..., I).
        nodes: (n, k), of which the first writes `down` and the second `up`.
        rank: r.

    Returns:
        (..., W). A second derivative is refused.

    Source: as `mixed_nodes`.
    """
    return _PlusWritten.apply(*split(onto), x, rank, start, scale, nodes, *writing)


class _PlusWritten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor | None, weight: Tensor | None, bias: Tensor | None, x: Tensor,
        rank: int, start: int, scale: float, nodes: Tensor, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        writing = Writing(*tensors)
        down = (writing.down_weight * nodes[0]).sum(-1).add_(writing.down_bias).view(rank, -1)
        up = (writing.up_weight * nodes[1]).sum(-1).add_(writing.up_bias).view(-1, rank)
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.T
        part = None if len(up) == (len(weight) if out is None else out.shape[-1]) else (start, len(up))
        whole = add_product(out, rows, (weight, bias), inner, up.T, scale, part)
        ctx.save_for_backward(rows, weight, down, up, inner, nodes, writing.down_weight, writing.up_weight)
        ctx.part, ctx.scale, ctx.shape = part, scale, x.shape
        return whole.view(*x.shape[:-1], whole.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, inner, nodes, down_weight, up_weight = ctx.saved_tensors
        of_out, _, _, of_x, *_ = ctx.needs_input_grad
        whole = gradient.reshape(-1, gradient.shape[-1])
        piece = whole if ctx.part is None else whole.narrow(1, *ctx.part)
        given_up = (piece.T @ inner).mul_(ctx.scale).view(1, -1)
        inward = (piece @ up).mul_(ctx.scale)
        given_down = (inward.T @ rows).view(1, -1)
        return (
            gradient if of_out else None,
            None,
            None,
            input_gradient(whole, weight, inward, down).view(ctx.shape) if of_x else None,
            None,
            None,
            None,
            torch.cat((given_down @ down_weight, given_up @ up_weight)),
            given_down.T * nodes[0],
            given_down[0],
            given_up.T * nodes[1],
            given_up[0],
        )
