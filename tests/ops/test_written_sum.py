"""A map's output plus a path whose factors a graph writes, in one function: the plain form, forward and backward."""

import pytest
import torch
from torch.nn import functional

from mmpeft_ds.ops.beside_linear import Linear
from mmpeft_ds.ops.node_graph import node_mix
from mmpeft_ds.ops.written_sum import Graph, Writing, mixed_nodes, plus_written

WIDE, OUT, RANK, K, RELATIONS = 5, 3, 2, 4, 3
ADJACENCIES = {
    "released": torch.eye(2).expand(RELATIONS, 2, 2),
    "dense": torch.ones(RELATIONS, 2, 2),
    "one node without neighbours": torch.tensor([[0.0, 0.0], [1.0, 2.0]]).expand(RELATIONS, 2, 2),
}


def inputs(adjacency):
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    attention = drawn(1, 2 * K), drawn(1)
    gate = drawn(1, K), drawn(1)
    mixing = (drawn(2, K), drawn(RELATIONS, K, K), drawn(RELATIONS, K), *attention, *gate)
    edges = ADJACENCIES[adjacency].double().clone().requires_grad_()
    factors = drawn(RANK * WIDE, K), drawn(RANK * WIDE), drawn(OUT * RANK, K), drawn(OUT * RANK)
    return drawn(2, 4, WIDE), Graph(*mixing, edges), Writing(*factors)


def linear(width):
    generator = torch.Generator().manual_seed(9)
    return Linear(*(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((width, WIDE), (width,))))


def mixed(graph):
    node, weight, bias, attention, shift, gate, gate_bias, adjacency = graph
    return node_mix(node, weight, bias, attention[0], shift, adjacency, gate[0], gate_bias)


def plain(x, graph, writing):
    maps = zip(mixed(graph), writing[::2], writing[1::2], strict=True)
    down, up = (functional.linear(n, w, b) for n, w, b in maps)
    return functional.linear(functional.linear(x, down.view(RANK, WIDE)), up.view(OUT, RANK))


def outcome(result, tensors):
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    given = torch.autograd.grad((result * weights).sum(), tensors, allow_unused=True)
    return [result, *(torch.zeros_like(t) if g is None else g for g, t in zip(given, tensors, strict=True))]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(("width", "start"), [(OUT, 0), (OUT + 4, 3)])
@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_equals_the_sum(adjacency, width, start, joined):
    (x, graph, writing), base = inputs(adjacency), linear(width)
    added = functional.pad(plain(x, graph, writing), (start, width - start - OUT))
    expected = functional.linear(x, *base) + 0.3 * added
    onto = base if joined else functional.linear(x, *base)
    found = plus_written(onto, x, mixed_nodes([graph])[0], writing, RANK, start=start, scale=0.3)
    tensors = [x, *graph, *writing]
    for a, e in zip(outcome(found, tensors), outcome(expected, tensors), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    x, graph, writing = inputs("dense")
    base = linear(OUT)
    edges = graph.adjacency.detach()

    def run(x, *tensors):
        nodes = mixed_nodes([Graph(*tensors[:7], edges)])[0]
        return plus_written(base, x, nodes, Writing(*tensors[7:]), RANK, scale=0.3)

    assert torch.autograd.gradcheck(run, (x, *graph[:7], *writing))


def test_the_published_adjacency_gives_the_attention_no_gradient_at_all():
    x, graph, writing = inputs("released")
    plus_written(linear(OUT), x.detach(), mixed_nodes([graph])[0], writing, RANK).sum().backward()
    assert x.grad is None and graph.node.grad.any()
    for name in ("attention_weight", "attention_bias", "adjacency"):
        assert not getattr(graph, name).grad.any()


def test_the_nodes_of_many_graphs_are_those_of_each_and_a_graph_without_gradient_gets_none():
    graphs = [inputs(adjacency)[1] for adjacency in ADJACENCIES]
    graphs[2] = Graph(*((t * 0.5).detach().requires_grad_() for t in graphs[2]))
    together, alone = mixed_nodes(graphs), [mixed(graph) for graph in graphs]
    for a, e in zip(together, alone, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    tensors = [t for graph in graphs for t in graph]
    found = torch.autograd.grad(sum(together[i].sin().sum() for i in (0, 2)), tensors, allow_unused=True)
    expected = torch.autograd.grad(sum(alone[i].sin().sum() for i in (0, 2)), tensors, allow_unused=True)
    count = len(Graph._fields)
    assert all(g is None for g in found[count : 2 * count])
    for a, e, t in zip(found, expected, tensors, strict=True):
        if a is not None:
            torch.testing.assert_close(a, torch.zeros_like(t) if e is None else e, rtol=1e-12, atol=1e-12)
