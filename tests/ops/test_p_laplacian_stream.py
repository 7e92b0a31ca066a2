"""The streaming p-Laplacian equals the dense one, outputs and gradients, whatever the tiles."""

import pytest
import torch

from mmpeft_ds.ops import p_laplacian_edges, score_tiles
from mmpeft_ds.ops.p_laplacian import attention_probabilities, p_laplacian, p_laplacian_published, pool_keys
from mmpeft_ds.ops.p_laplacian_stream import p_laplacian_attention

B, H, d, b, G = 2, 3, 5, 4, 4
GRAPHS = ["square", "bipartite", "pooled", "published"]
SIZES = {"square": [(13, 13), (7, 19)], "bipartite": [(7, 19), (19, 7)], "pooled": [(7, 19)], "published": [(7, 19)]}


def dense(q, k, f, g, p, mu, *, mask=None, causal=False, graph, exact=True, groups=None, scaling=None):
    """The same call through the whole attention map."""
    A = attention_probabilities(q, k, mask, causal=causal, scaling=scaling)
    if graph == "published":
        return p_laplacian_published(A, f, g, p, mu)
    A = pool_keys(A, groups, -1) if graph == "pooled" else A
    square = graph == "square"
    return p_laplacian(A, f, g, p, mu, self_term=square, square=square, exact=exact)


def inputs(graph, rows, columns, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    nodes = G if graph == "pooled" else columns
    sizes = [(rows, d), (columns, d), (rows, b), (nodes, b)]
    return [torch.randn(B, H, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def outcome(form, tensors, p, *, graph, **options):
    """U and the gradients of q, k, f (but on a square graph), g, p, mu."""
    q, k, f, g = (x.clone().requires_grad_() for x in tensors)
    power, mu = (torch.tensor(x, dtype=q.dtype, requires_grad=True) for x in (p, 0.2))
    leaves = [q, k, g, power, mu] if graph == "square" else [q, k, f, g, power, mu]
    if graph == "square":
        f = g[:, :, g.shape[2] - q.shape[2] :]
    U = form(q, k, f, g, power, mu, graph=graph, groups=G if graph == "pooled" else None, **options)
    weights = torch.randn(U.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [U, *torch.autograd.grad((U * weights.to(U.dtype)).sum(), leaves)]


def worst(found, expected):
    """Largest error relative to the largest entry, over U and gradients."""
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - e).abs().max() / e.abs().max().clamp_min(1e-3)).item() for a, e in pairs)


def masks(kind, rows, columns):
    if kind == "none":
        return None
    keep = torch.rand(B, 1, rows, columns, generator=torch.Generator().manual_seed(3)) > 0.4
    if kind == "empty rows":
        keep[0, :, 2], keep[:, :, :, 1] = False, False
        return keep
    if kind == "additive":
        keep[..., 0] = True
        return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -1e4)
    # Rows that hold nothing else: all keys count alike there.
    keep[0, :, 2] = False
    return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("tile", [(4, 5), None])
@pytest.mark.parametrize("mask", ["none", "additive", "least number", "empty rows"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_equals_the_dense_form(graph, exact, mask, tile):
    for rows, columns in SIZES[graph]:
        for causal in (False,) if graph == "published" else (False, True):
            for p in (1.25, 2.5):
                tensors = inputs(graph, rows, columns)
                options = {"graph": graph, "exact": exact, "mask": masks(mask, rows, columns), "causal": causal}
                expected = outcome(dense, tensors, p, **options)
                found = outcome(p_laplacian_attention, tensors, p, tile=tile, **options)
                assert all(x.isfinite().all() for x in found)
                assert worst(found, expected) < 1e-12


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_float32_is_as_exact_as_float32_can_be(graph, exact):
    for p in (1.25, 1.6, 2.5):
        tensors = inputs(graph, 40, 40)
        expected = outcome(dense, tensors, p, graph=graph, exact=exact)
        found = outcome(p_laplacian_attention, [x.float() for x in tensors], p, graph=graph, exact=exact)
        assert worst(found, expected) < 1e-5


def test_bfloat16_queries_and_autocast_leave_float32_inside():
    tensors = [x.bfloat16() for x in inputs("square", 13, 13)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        U = p_laplacian_attention(*tensors[:2], tensors[3], tensors[3], 1.5, 0.2, tile=(4, 5))
        mixed = p_laplacian_attention(*tensors[:2], tensors[3].float(), tensors[3].float(), 1.5, 0.2, tile=(4, 5))
    assert U.dtype == torch.bfloat16
    wide = [x.double() for x in tensors]
    expected = dense(*wide[:2], wide[3], wide[3], 1.5, 0.2, graph="square")
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_equal_nodes_count_as_eps_apart(exact):
    """Two tokens with the same node: where a formula of products would leave rounding, differences leave 0."""
    q, k, _, g = inputs("square", 13, 13)
    g[:, :, 5] = g[:, :, 2]
    for p in (1.5, 2.5):
        expected = outcome(dense, [q, k, g, g], p, graph="square", exact=exact)
        found = outcome(p_laplacian_attention, [q, k, g, g], p, graph="square", exact=exact, tile=(4, 5))
        # The pair's weight is of the order of 1e4 and more, and so is the rounding of both.
        assert worst(found, expected) < 1e-9


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_gradcheck(graph, exact):
    q, k, f, g = (x[:1, :1].requires_grad_() for x in inputs(graph, 4, 6))
    p, mu = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.6, 0.3))
    options = {"graph": graph, "exact": exact, "tile": (3, 4), "groups": G if graph == "pooled" else None}

    def run(q, k, f, g, p, mu):
        return p_laplacian_attention(q, k, g[:, :, 2:] if graph == "square" else f, g, p, mu, **options)

    # On a square graph f comes from g and its own leaf has no part.
    leaves = [x.detach() if x is f and graph == "square" else x for x in (q, k, f, g, p, mu)]
    assert torch.autograd.gradcheck(run, leaves)


def test_the_comparison_sees_a_wrong_sign_and_a_missing_eps(monkeypatch):
    """Controls: each mistake in the tiles is found at the tolerance of the tests above."""
    tensors = inputs("bipartite", 7, 19)
    expected = outcome(dense, tensors, 1.25, graph="bipartite")
    assert worst(outcome(p_laplacian_attention, tensors, 1.25, graph="bipartite", exact=False), expected) > 1e-10
    right = p_laplacian_edges.distances

    def flipped(job, rows, columns):
        squared, total = right(job, rows, columns)
        return squared, -total

    monkeypatch.setattr(p_laplacian_edges, "distances", flipped)
    assert worst(outcome(p_laplacian_attention, tensors, 1.25, graph="bipartite"), expected) > 1e-10


def test_no_tensor_of_all_pairs_is_ever_made():
    """Shapes of everything that is created, forward and backward, with as many rows in a tile as on a CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, largest = 300, [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest[0] = max(largest[0], x.untyped_storage().nbytes() // x.element_size())
            return out

    generator = torch.Generator().manual_seed(0)
    q, k, g = (torch.randn(1, 1, tokens, n, generator=generator).requires_grad_() for n in (d, d, b))
    for graph, exact in [("square", True), ("square", False), ("pooled", True), ("published", True)]:
        nodes = g[:, :, :G] if graph == "pooled" else g
        with Watch():
            U = p_laplacian_attention(
                q,
                k,
                g,
                nodes,
                1.5,
                0.2,
                graph=graph,
                exact=exact,
                groups=G if graph == "pooled" else None,
                tile=(16, 64),
            )
            U.sum().backward()
    assert 16 * 64 <= largest[0] <= tokens * 16
    with Watch():
        dense(q, k, g, g, 1.5, 0.2, graph="square")
    assert largest[0] >= tokens * tokens * b


def test_a_step_with_a_cache_equals_the_row_of_the_whole_pass():
    q, k, _, g = inputs("square", 13, 13)
    whole, lse = p_laplacian_attention(q, k, g, g, 1.5, 0.2, causal=True, return_lse=True)
    step = p_laplacian_attention(q[:, :, 12:], k, g[:, :, 12:], g, 1.5, 0.2, causal=True)
    torch.testing.assert_close(step, whole[:, :, 12:])
    early = p_laplacian_attention(q[:, :, 4:9], k, g[:, :, 4:9], g, 1.5, 0.2, causal=True, offset=4)
    torch.testing.assert_close(early, whole[:, :, 4:9])
    ahead = torch.ones(13, 13, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * d**-0.5).masked_fill(ahead, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_only_wanted_gradients_are_made():
    q, k, f, g = inputs("bipartite", 7, 19)
    p = torch.tensor([1.5], requires_grad=True)
    p_laplacian_attention(q, k, f, g, p, 0.2, graph="bipartite").sum().backward()
    assert p.grad.shape == (1,)
    assert p.grad.dtype == torch.float32


def test_a_second_derivative_is_refused():
    q, k, f, g = (x.requires_grad_() for x in inputs("bipartite", 4, 6))
    U = p_laplacian_attention(q, k, f, g, 1.5, 0.2, graph="bipartite")
    (first,) = torch.autograd.grad(U.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph": "round"}, "is none of"),
        ({"graph": "published", "causal": True}, "future"),
        ({"graph": "pooled"}, "groups"),
        ({"graph": "bipartite", "groups": 4}, "groups"),
        ({"graph": "pooled", "groups": 4}, "needs nodes"),
        ({"graph": "square", "offset": 9}, "set offset"),
        ({"graph": "square", "mask": torch.ones(3, 1, 4, 6)}, "does not broadcast"),
        ({"graph": "square", "mask": torch.zeros(4, 6, requires_grad=True)}, "detach"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    q, k, f, g = inputs("bipartite", 4, 6)
    with pytest.raises(ValueError, match=message):
        p_laplacian_attention(q, k, f, g, 1.5, 0.2, **options)


def test_default_tiles_shrink_with_the_number_of_heads():
    one, many = (score_tiles.default_tile(heads, torch.device("cpu")) for heads in (1, 96))
    assert one[1] > many[1] >= score_tiles.MIN_KEYS
