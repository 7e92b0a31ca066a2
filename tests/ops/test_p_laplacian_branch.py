"""The gated branch as one function equals its pieces, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmpeft_ds.ops.beside_linear import Linear
from mmpeft_ds.ops.p_laplacian import attention_probabilities, p_laplacian
from mmpeft_ds.ops.p_laplacian_branch import Exponent, Maps, Nodes, Scores, hidden_keys, plus_branch

B, H, b, D = 2, 3, 2, 7
BOUNDS = (1.0, 3.0)


def inputs(rows, columns, square, p=1.25):
    """h, A, values, queries, p, m and the maps."""
    generator = torch.Generator().manual_seed(rows)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = drawn(B, H, rows, columns).softmax(-1)
    A[0, 0, 0] = 0.0  # a row that sees nothing
    shapes = [(H * b, D), (H * b,), (H * b, D), (H * b,), (D, H * b), (D,)]
    given = [drawn(B, rows, D), A, drawn(B, columns, D), None if square else drawn(B, rows, D)]
    given += [torch.tensor([p], dtype=torch.float64), drawn(1), *(drawn(*s) for s in shapes)]
    return [t if t is None else t.requires_grad_() for t in given]


def nodes(tokens, maps):
    wide = functional.linear(tokens, maps.down_weight, maps.down_bias)
    return wide.unflatten(-1, (H, b)).transpose(1, 2)


def pieces(h, A, values, queries, p, m, *tensors):
    maps, square = Maps(*tensors), queries is None
    g = nodes(values, maps)
    f = g[..., g.shape[2] - h.shape[1] :, :] if square else nodes(queries, maps)
    power = p.clamp(*BOUNDS)
    U = p_laplacian(A, f, g, power, 0.1 * (2 + torch.tanh(m)), self_term=square, square=square)
    gate = functional.gelu(functional.linear(h, maps.gate_weight, maps.gate_bias))
    return h + functional.linear(gate * U.transpose(1, 2).flatten(2), maps.up_weight, maps.up_bias)


def whole(h, A, values, queries, p, m, *tensors):
    nodes = Nodes(values, queries, None)
    return plus_branch(h, None, A, nodes, Maps(*tensors), Exponent(p, m, 0.1, BOUNDS), H)


def outcome(form, given):
    result = form(*given)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result, *torch.autograd.grad((result * weights).sum(), [t for t in given if t is not None])]


@pytest.mark.parametrize("p", [1.25, 2.5])
@pytest.mark.parametrize(("rows", "columns", "square"), [(6, 6, True), (4, 9, True), (6, 9, False), (9, 4, False)])
def test_equals_its_pieces(rows, columns, square, p):
    found, expected = (outcome(form, inputs(rows, columns, square, p)) for form in (whole, pieces))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("columns", [6, 9])
@pytest.mark.parametrize("whole_end", [True, False])
def test_frozen_maps_before_it_are_part_of_the_function(columns, whole_end):
    square, wide = columns == 6, 5
    h, A, values, queries, *rest = inputs(6, columns, square)
    generator = torch.Generator().manual_seed(1)
    end, projection = (
        Linear(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((D, wide), (D,))))
        for _ in range(2)
    )
    tokens = [t if t is None else t.detach()[..., :wide].requires_grad_() for t in (h, values, queries)]

    def joined(x, values, queries, A, p, m, *tensors):
        onto = end if whole_end else functional.linear(x, *end)
        exponent = Exponent(p, m, 0.1, BOUNDS)
        return plus_branch(onto, x, A, Nodes(values, queries, projection), Maps(*tensors), exponent, H)

    def apart(x, values, queries, A, *others):
        values, queries = (t if t is None else functional.linear(t, *projection) for t in (values, queries))
        return pieces(functional.linear(x, *end), A, values, queries, *others)

    for a, e in zip(*(outcome(form, [*tokens, A, *rest]) for form in (joined, apart)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


def test_one_sample_is_no_other_case():
    for columns, square in ((6, True), (9, False)):
        given = [
            t if t is None or i > 3 else t.detach()[:1].requires_grad_()
            for i, t in enumerate(inputs(6, columns, square))
        ]
        found, expected = (outcome(form, given) for form in (whole, pieces))
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("p", "used"), [(0.5, 1.0), (4.0, 3.0)])
def test_outside_of_its_bounds_p_learns_only_what_leads_back(p, used):
    at_bound = outcome(whole, inputs(6, 6, True, used))
    for sign in (1, -1):
        given = inputs(6, 6, True, p)
        result = whole(*given)
        assert torch.equal(result, at_bound[0])
        weights = sign * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
        (result * weights).sum().backward()
        slope = sign * plain_slope(used)
        leads_back = slope < 0 if p < used else slope > 0
        torch.testing.assert_close(given[4].grad.item(), slope if leads_back else 0.0)


def plain_slope(p: float) -> float:
    """Gradient of a p that is free."""
    given = inputs(6, 6, True, p)
    nodes = Nodes(given[2], given[3], None)
    result = plus_branch(given[0], None, given[1], nodes, Maps(*given[6:]), Exponent(given[4], given[5], 0.1, None), H)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return torch.autograd.grad((result * weights).sum(), given[4])[0].item()


def test_a_number_for_p_and_tokens_without_gradient():
    given = [t.detach() if isinstance(t, Tensor) and i < 4 else t for i, t in enumerate(inputs(6, 9, False))]
    h, A, values, queries, p, m, *tensors = given
    nodes = Nodes(values, queries, None)
    fixed = plus_branch(h, None, A, nodes, Maps(*tensors), Exponent(1.25, m, 0.1, BOUNDS), H)
    trained = whole(*given)
    assert torch.equal(fixed, trained)
    trained.sum().backward()
    assert p.grad.any() and m.grad.any() and all(t.grad is not None for t in tensors) and h.grad is None


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "of keys": (torch.tensor([[[[True] * 4 + [False] * 2]], [[[False] * 6]]]), False),  # the second sees nothing
    "added": (torch.linspace(-2, 0, 36, dtype=torch.float64).view(1, 1, 6, 6), True),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_map_by_its_scores_gives_the_same(mask, scaling):
    h, _, *rest = inputs(6, 6, True)
    query, key = (torch.randn(B, H, 6, 4, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2))
    where, causal = MASKS[mask]

    def by_scores(q, k, *others):
        hidden = hidden_keys(where, causal, (B, H, 6, 6), q.dtype)
        assert (hidden.empty is not None) == (mask == "of keys")
        return whole(h, Scores(q, k, hidden, scaling), *others)

    def by_map(q, k, *others):
        return whole(h, attention_probabilities(q, k, where, causal=causal, scaling=scaling), *others)

    given = [query.requires_grad_(), key.requires_grad_(), *rest]
    results = [outcome(form, given) for form in (by_scores, by_map)]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_shapes_that_do_not_belong_together_are_refused():
    h, A, values, queries, *rest = inputs(6, 9, False)
    with pytest.raises(ValueError, match="does not belong to 2 times 6 tokens"):
        whole(h, A[:, :2], values, queries, *rest)
