"""A map's output plus a Tucker slice in one function equals the sum of both, forward and backward."""

import pytest
import torch
from torch.nn import functional

from mmpeft_ds.ops.beside_linear import Linear
from mmpeft_ds.ops.middle_sum import plus_middle
from mmpeft_ds.ops.tensor_update import tucker_delta, tucker_slice, tucker_slices

D, OUT, RANKS, SIZES, ROWS = 6, 5, (3, 2), (4, 3), (1, 2)


def inputs(modes):
    """x, down, up, core and the tables."""
    generator = torch.Generator().manual_seed(modes)
    beside = (2, 4)[:modes]
    shapes = [(2, 4, D), (D, RANKS[0]), (OUT, RANKS[1]), (*RANKS, *beside), *zip(SIZES, beside, strict=False)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def linear(width):
    generator = torch.Generator().manual_seed(9)
    return Linear(*(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((width, D), (width,))))


def plus_slice(onto, x, down, up, core, *tables, start=0):
    at = (0, ROWS[0], ROWS[0] * SIZES[1] + ROWS[1])[len(tables)]
    return plus_middle(onto, x, down.T, tucker_slices(core, tables)[at], up, part=(start, OUT))


def outcome(result, given):
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result, *torch.autograd.grad((result * weights).sum(), given)]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(("width", "start"), [(OUT, 0), (OUT + 4, 3)])
@pytest.mark.parametrize("modes", [0, 1, 2])
def test_equals_the_sum(modes, width, start, joined):
    given, base = inputs(modes), linear(width)
    x, down, up, core, *tables = given
    out = functional.linear(x, *base)
    delta = tucker_delta(x, down, up, tucker_slice(core, [t[r] for t, r in zip(tables, ROWS, strict=False)]))
    expected = out + functional.pad(delta, (start, width - start - OUT))
    onto = base if joined else functional.linear(x, *base)
    found = plus_slice(onto, *given, start=start)
    for a, e in zip(outcome(found, given), outcome(expected, given), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    base = linear(OUT)
    assert torch.autograd.gradcheck(lambda *given: plus_slice(base, *given), inputs(2))


def test_an_output_that_is_given_stays_as_it_is_and_an_input_may_be_without_gradient():
    x, down, *rest = inputs(2)
    out = torch.zeros(2, 4, OUT + 4, dtype=x.dtype)
    found = plus_slice(out, x.detach(), down, *rest, start=3)
    assert not out.any() and found[..., 3 : 3 + OUT].any() and not found[..., :3].any()
    found.sum().backward()
    assert down.grad.any() and x.grad is None
