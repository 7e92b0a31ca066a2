"""The dense p-Laplacian: closed forms, masks, precision, pooling; and the propagation rules beside it."""

import math

import pytest
import torch

from mmpeft_ds.ops.p_laplacian import attention_probabilities, p_laplacian, p_laplacian_published, pool_keys
from mmpeft_ds.ops.propagation import appnp, gcn, gcnii

B, H, N, M, b = 2, 3, 6, 9, 4


def _map(rows=N, columns=M, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(B, H, rows, columns, dtype=dtype).softmax(-1)


def _nodes(tokens, seed=1, dtype=torch.float64):
    return torch.randn(B, H, tokens, b, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _literal(A, f, g, p, mu, self_term, eps=1e-8):
    """Spec 1.2 steps 4 to 6, entry by entry."""
    U = torch.zeros_like(f)
    c = 2 * mu / p
    for at in torch.cartesian_prod(*(torch.arange(n) for n in f.shape[:3])).tolist():
        i, lead = at[2], tuple(at[:2])
        total, numerator = 0.0, torch.zeros(b, dtype=f.dtype)
        for j in range(g.shape[2]):
            a = A[lead][i, j]
            n = ((a + eps).sqrt() * (g[lead][j] - f[lead][i]) + eps).norm()
            w = a * n ** (p - 2)
            total, numerator = total + w, numerator + w * g[lead][j]
        U[lead][i] = (numerator + (c * f[lead][i] if self_term else 0)) / (total + c)
    return U


@pytest.mark.parametrize("p", [1.25, 1.7, 2.5])
@pytest.mark.parametrize("square", [True, False])
def test_equals_the_formula_written_entry_by_entry(p, square):
    A, g = _map(N if square else N, N if square else M), _nodes(N if square else M)
    f = g if square else _nodes(N, 2)
    U = p_laplacian(A, f, g, p, 0.3, self_term=square, square=square)
    torch.testing.assert_close(U, _literal(A, f, g, p, 0.3, square), rtol=1e-12, atol=1e-12)


def test_the_sign_of_the_difference_and_eps_are_visible():
    """Controls of the test above: both mistakes are far larger than its tolerance."""
    A, f, g = _map(), _nodes(N, 2), _nodes(M)
    right = p_laplacian(A, f, g, 1.25, 0.3, self_term=False, square=False)
    flipped = p_laplacian(A, -f, -g, 1.25, 0.3, self_term=False, square=False)
    assert (right + flipped).abs().max() > 1e-10
    without = p_laplacian(A, f, g, 1.25, 0.3, self_term=False, square=False, exact=False)
    assert 1e-10 < (right - without).abs().max() < 1e-5


def test_p_of_two_is_the_closed_form():
    A, f, g, mu = _map(N, N), _nodes(N), _nodes(N, 2), 0.4
    square = p_laplacian(A, f, f, 2.0, mu, self_term=True, square=True)
    torch.testing.assert_close(square, (A @ f + mu * f) / (1 + mu))
    pooled = pool_keys(A, 4, -1)
    bipartite = p_laplacian(pooled, f, g[:, :, :4], 2.0, mu, self_term=False, square=False)
    torch.testing.assert_close(bipartite, pooled @ g[:, :, :4] / (pooled.sum(-1, keepdim=True) + mu))
    exponents = torch.tensor(1.9, dtype=torch.float64)
    assert (p_laplacian(A, f, f, exponents, mu, self_term=True, square=True) - square).abs().max() > 1e-3


def test_published_equals_the_block_graph_of_the_paper():
    """Equations 12 to 15 on all N + M nodes, of which the first N rows are kept."""
    A, q, v, p, mu = _map(), _nodes(N), _nodes(M, 2), 1.4, 0.3
    zero = lambda rows, columns: torch.zeros(B, H, rows, columns, dtype=A.dtype)  # noqa: E731
    whole = torch.cat([torch.cat([zero(N, N), A], -1), torch.cat([A.mT, zero(M, M)], -1)], -2)
    nodes, degree = torch.cat([q, v], 2), whole.sum(-1)
    left = (whole / degree[..., None]).sqrt()[..., None] * nodes[:, :, :, None]
    right = (whole / degree[..., None, :]).sqrt()[..., None] * nodes[:, :, None]
    norm = (left - right).norm(dim=-1)
    edge = torch.where(whole > 0, whole * torch.where(whole > 0, norm, 1.0) ** (p - 2), 0.0)
    alpha = 1 / ((edge / degree[..., None]).sum(-1, keepdim=True) + 2 * mu / p)
    scaled = edge / degree.sqrt()[..., None] / degree.sqrt()[..., None, :]
    expected = (alpha * (scaled @ nodes) + 2 * mu / p * alpha * nodes)[:, :, :N]
    torch.testing.assert_close(p_laplacian_published(A, q, v, p, mu), expected, rtol=1e-12, atol=1e-12)


def test_rows_that_are_the_last_nodes_equal_the_rows_of_the_whole_graph():
    """A step with a cache: few rows, all columns."""
    nodes = _nodes(N)
    A = attention_probabilities(_nodes(N, 3), _nodes(N, 4), causal=True)
    whole = p_laplacian(A, nodes, nodes, 1.5, 0.2, self_term=True, square=True)
    last = p_laplacian(A[:, :, 4:], nodes[:, :, 4:], nodes, 1.5, 0.2, self_term=True, square=True)
    torch.testing.assert_close(last, whole[:, :, 4:])
    # A static cache has empty columns after the present ones.
    wide, more = torch.cat([A, torch.zeros_like(A)], -1), torch.cat([nodes, _nodes(N, 9)], 2)
    offset = p_laplacian(wide[:, :, 4:], nodes[:, :, 4:], more, 1.5, 0.2, self_term=True, square=True, offset=4)
    torch.testing.assert_close(offset, whole[:, :, 4:])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("p", [1.25, 2.0, 2.5])
def test_fully_masked_rows_give_finite_values_and_gradients(p, exact):
    q, k, f, g = (_nodes(n, s).requires_grad_() for s, n in enumerate((N, M, N, M)))
    keep = torch.ones(B, 1, N, M, dtype=torch.bool)
    keep[0, :, 2], keep[:, :, :, 1] = False, False
    A = attention_probabilities(q, k, keep)
    assert A[0, :, 2].count_nonzero() == 0
    power = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    U = p_laplacian(A, f, g, power, 0.2, self_term=False, square=False, exact=exact)
    published = p_laplacian_published(A, f, g, power, 0.2)
    assert U[0, :, 2].count_nonzero() == 0
    torch.testing.assert_close(published[0, :, 2], f[0, :, 2])
    grads = torch.autograd.grad((U.sin() + published.sin()).sum(), (q, k, f, g, power))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][:, :, 1].count_nonzero() == 0
    # The control: torch's own softmax of such a row is NaN.
    scores = (q @ k.mT).masked_fill(~keep, -math.inf)
    assert scores.softmax(-1).isnan().any()


@pytest.mark.parametrize("p", [1.25, 1.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_the_gradient_of_p_that_float32_gives(dtype, p):
    A, nodes = _map(N, N).to(dtype), _nodes(N).to(dtype)

    def slope(kind, autocast=False):
        power = torch.tensor([p], requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            U = p_laplacian(A.to(kind), nodes.to(kind), nodes.to(kind), power, 0.2, self_term=True, square=True)
        weights = _nodes(N, 5).to(U.dtype)
        return U, torch.autograd.grad((U * weights).sum(), power)[0]

    _, exact = slope(torch.float64)
    for U, found in (slope(dtype), slope(dtype, autocast=True)):
        assert U.dtype == dtype
        # The cotangent is rounded to half; everything else is not.
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(slope(torch.float32, autocast=True)[1], exact, rtol=1e-5, atol=1e-7)


def test_a_heavy_self_loop_leaves_the_gradient_of_p_its_digits_in_float32():
    def slope(dtype):
        power = torch.tensor(1.25, dtype=dtype, requires_grad=True)
        A, nodes = _map(N, N).to(dtype), _nodes(N).to(dtype)
        U = p_laplacian(A, nodes, nodes, power, 0.2, self_term=True, square=True)
        return torch.autograd.grad((U * _nodes(N, 5).to(dtype)).sum(), power)[0]

    torch.testing.assert_close(slope(torch.float32).double(), slope(torch.float64), rtol=1e-5, atol=0)


def test_gradients_of_all_inputs():
    A, f, g = (x[:1, :1].clone().requires_grad_() for x in (_map(3, 4), _nodes(3), _nodes(4, 2)))
    p, mu = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.6, 0.3))
    for self_term in (True, False):
        run = lambda *x: p_laplacian(*x, self_term=self_term, square=False)  # noqa: E731, B023
        assert torch.autograd.gradcheck(run, (A, f, g, p, mu))
    assert torch.autograd.gradcheck(p_laplacian_published, (A, f, g, p, mu))


@pytest.mark.parametrize(("keys", "groups"), [(197, 16), (11, 4), (8, 4), (3, 5)])
def test_pooling_takes_the_mean_of_overlapping_bins(keys, groups):
    x = torch.randn(2, 3, 5, keys, dtype=torch.float64)
    means = [x[..., t * keys // groups : -(-(t + 1) * keys // groups)].mean(-1) for t in range(groups)]
    torch.testing.assert_close(pool_keys(x, groups, -1), torch.stack(means, -1))
    torch.testing.assert_close(pool_keys(x.movedim(-1, 1), groups, 1), torch.stack(means, 1))
    assert pool_keys(x.bfloat16(), groups, -1).dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs query nodes"):
        p_laplacian(_map(), _nodes(N), _nodes(N), 1.5, 0.2, self_term=False, square=False)
    with pytest.raises(ValueError, match="set offset"):
        p_laplacian(_map(M, N), _nodes(M), _nodes(N), 1.5, 0.2, self_term=True, square=True)


def test_gcn_is_the_limit_of_the_p_laplacian_and_appnp_its_value_at_two():
    A, f, g = _map(N, N), _nodes(N), _nodes(M)
    torch.testing.assert_close(gcn(A, f, f, square=True), A @ f)
    mu = 0.25
    teleport = mu / (1 + mu)
    expected = p_laplacian(A, f, f, 2.0, mu, self_term=True, square=True)
    torch.testing.assert_close(appnp(A, f, f, square=True, teleport=teleport), expected)
    half = _map() / 2  # as a pooled map: rows sum to less than 1
    torch.testing.assert_close(gcn(half, f, g, square=False), 2 * half @ g)


def test_appnp_converges_to_personalised_pagerank():
    A, f = _map(N, N), _nodes(N)
    limit = 0.2 * torch.linalg.solve(torch.eye(N, dtype=A.dtype) - 0.8 * A, f)
    torch.testing.assert_close(appnp(A, f, f, square=True, teleport=0.2, steps=200), limit)
    assert (appnp(A, f, f, square=True, teleport=0.2) - limit).abs().max() > 1e-2
    with pytest.raises(ValueError, match="use steps=1"):
        appnp(A[:, :, 4:], f[:, :, 4:], f, square=True, steps=2)


def test_gcnii_mixes_identity_and_weight():
    A, f = _map(N, N), _nodes(N)
    weight = torch.randn(b, b, dtype=torch.float64)
    beta = math.log(0.5 / 3 + 1)
    smooth = 0.9 * A @ f + 0.1 * f
    expected = (smooth @ ((1 - beta) * torch.eye(b, dtype=A.dtype) + beta * weight)).relu()
    torch.testing.assert_close(gcnii(A, f, f, weight, square=True, layer=3), expected)
    masked = A.clone()
    masked[:, :, 1] = 0
    leaf = masked.requires_grad_()
    U = gcnii(leaf, f, f, weight, square=True)
    assert U.isfinite().all()
    assert torch.autograd.grad(U.sum(), leaf)[0].isfinite().all()
