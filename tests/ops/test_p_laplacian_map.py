"""The p-Laplacian step of few operations equals the dense form, outputs and gradients."""

import statistics

import pytest
import torch

from mmpeft_ds.ops.p_laplacian import p_laplacian
from mmpeft_ds.ops.p_laplacian_map import HELD, MOST, fits, p_laplacian_of_map

B, H, b = 2, 3, 4
SIZES = {True: [(6, 6), (4, 9)], False: [(6, 9), (9, 4)]}


def inputs(rows, columns, square, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(rows + seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = drawn(B, H, rows, columns).softmax(-1)
    A[0, 0, 0] = 0.0  # a row that sees nothing
    A[..., 1] = 0.0  # a key that nobody sees
    f = None if square else drawn(B, H, rows, b).to(dtype).requires_grad_()
    # nodes as an adapter cuts them: not contiguous
    g = drawn(B, columns, H, b).to(dtype).transpose(1, 2).requires_grad_()
    return A.to(dtype).requires_grad_(), f, g


def outcome(form, A, f, g, p, mu, square, self_term):
    """U, then the gradients of A, f, g, p and mu."""
    p, mu = (torch.tensor(x, dtype=g.dtype, requires_grad=True) for x in (p, mu))
    rows = g[..., g.shape[2] - A.shape[2] :, :]
    nodes = f if f is not None else rows if form is p_laplacian else None
    U = form(A, nodes, g, p, mu, self_term=self_term, square=square)
    weights = torch.randn(U.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(U.dtype)
    wanted = [x for x in (A, f, g, p, mu) if x is not None]
    return [U, *torch.autograd.grad((U * weights).sum(), wanted)]


def errors(found, expected):
    pairs = zip(found, expected, strict=True)
    return [((a.double() - e).abs().max() / e.abs().max().clamp_min(1e-3)).item() for a, e in pairs]


def worst(found, expected):
    return torch.tensor(errors(found, expected)).max().item()  # NaN where one is: Python's max would pass over it


@pytest.mark.parametrize("p", [1.0, 1.25, 2.0, 2.5])
@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("square", [True, False])
def test_equals_the_dense_form(square, self_term, p):
    for rows, columns in SIZES[square]:
        given = inputs(rows, columns, square)
        expected = outcome(p_laplacian, *given, p, 0.2, square, self_term)
        found = outcome(p_laplacian_of_map, *given, p, 0.2, square, self_term)
        assert all(x.isfinite().all() for x in found)
        assert worst(found, expected) < 1e-9 if p == 1.0 else worst(found, expected) < 1e-11


@pytest.mark.parametrize("square", [True, False])
def test_without_a_pull_mu_still_has_a_gradient(square):
    A, f, g = inputs(7, 7 if square else 9, square)
    A = (A.detach() + 0.1).requires_grad_()  # a row that sees nothing would be 0 / 0
    found, expected = (outcome(form, A, f, g, 1.5, 0.0, square, False) for form in (p_laplacian_of_map, p_laplacian))
    assert worst(found, expected) < 1e-9


@pytest.mark.parametrize("square", [True, False])
def test_float32_is_as_exact_as_float32_can_be(square):
    for p in (1.25, 1.6, 2.5):
        for size in SIZES[square]:
            draws = []
            for seed in range(9):
                expected = outcome(p_laplacian, *inputs(*size, square, seed=seed), p, 0.2, square, square)
                found = outcome(
                    p_laplacian_of_map, *inputs(*size, square, torch.float32, seed), p, 0.2, square, square
                )
                draws.append(errors(found, expected))
            *others, of_p, of_mu = zip(*draws, strict=True)
            assert max(max(each) for each in others) < 2e-6
            # differences, which may nearly cancel
            assert statistics.median(of_p) < 1e-5 and statistics.median(of_mu) < 2e-6


def test_one_sample_and_one_head_are_no_other_case():
    for lead in ((1, 3), (2, 1), (1, 1)):
        A, _, g = (None if x is None else x.detach() for x in inputs(6, 6, True))
        A, g = (x[: lead[0], : lead[1]].requires_grad_() for x in (A, g))
        expected = outcome(p_laplacian, A, None, g, 1.25, 0.2, True, True)
        assert worst(outcome(p_laplacian_of_map, A, None, g, 1.25, 0.2, True, True), expected) < 1e-11


def test_equal_nodes_count_as_eps_apart():
    A, _, g = inputs(6, 6, True)
    g = g.detach().clone()
    g[:, :, 5] = g[:, :, 2]
    g.requires_grad_()
    expected = outcome(p_laplacian, A, None, g, 1.5, 0.2, True, True)
    assert worst(outcome(p_laplacian_of_map, A, None, g, 1.5, 0.2, True, True), expected) < 1e-9


def test_numbers_in_place_of_tensors_and_a_map_without_gradient():
    A, _, g = inputs(6, 6, True)
    U = p_laplacian_of_map(A.detach(), None, g, 1.5, 0.2, self_term=True, square=True)
    tensors = p_laplacian_of_map(A, None, g, *torch.tensor([[1.5], [0.2]], dtype=A.dtype), self_term=True, square=True)
    assert torch.equal(U, tensors)
    (gradient,) = torch.autograd.grad(U.sum(), g)
    assert torch.equal(gradient, torch.autograd.grad(tensors.sum(), g)[0])


def test_wrong_shapes_and_second_derivatives_are_refused():
    A, f, g = inputs(6, 9, False)
    with pytest.raises(ValueError, match="give f=None"):
        p_laplacian_of_map(A, f, g, 1.5, 0.2, self_term=True, square=True)
    with pytest.raises(ValueError, match="needs query nodes"):
        p_laplacian_of_map(A, f[..., :2], g, 1.5, 0.2, self_term=False, square=False)
    U = p_laplacian_of_map(A, f, g, 1.5, 0.2, self_term=False, square=False)
    (gradient,) = torch.autograd.grad(U.sum(), f, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_only_small_maps_in_full_precision_are_taken():
    like = torch.empty(())
    edges = MOST // (HELD + b)
    assert fits((1, 1, 1, edges), b, like) and not fits((1, 1, 1, edges + 1), b, like)
    assert not fits((1, 1, 2, 2), b, like.bfloat16()) and not fits((1, 1, 2, 2), b, like.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which would round the products
        assert not fits((1, 1, 1, edges), b, like)
