"""A map with a parallel bottleneck in one function: the sum of both, forward and backward."""

import pytest
import torch
from torch.nn import functional

from mmpeft_ds.ops.beside_linear import Linear
from mmpeft_ds.ops.relu_sum import plus_relu

WIDE, INNER, RANK, OUT = 6, 5, 3, 4


def inputs():
    """x, t, then weight and bias of down and up, then those of the map, which is frozen."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 3, WIDE), (2, 3, INNER), (RANK, INNER), (RANK,), (OUT, RANK), (OUT,), (OUT, WIDE), (OUT,)]
    drawn = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    return [t.requires_grad_() for t in drawn[:6]], drawn[6:]


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_sum(bias):
    (x, t, down, down_bias, up, up_bias), (weight, shift) = inputs()
    base = Linear(weight, shift if bias else None)
    found = plus_relu(base, x, t, Linear(down, down_bias), Linear(up, up_bias))
    inner = functional.relu(functional.linear(t, down, down_bias))
    assert (inner == 0).any() and (inner > 0).any()
    expected = functional.linear(x, *base) + functional.linear(inner, up, up_bias)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("of_x", [True, False])
def test_gradients_are_those_of_finite_differences(of_x):
    given, base = inputs()
    given[0].requires_grad_(of_x)

    def run(x, t, down, down_bias, up, up_bias):
        return plus_relu(Linear(*base), x, t, Linear(down, down_bias), Linear(up, up_bias))

    assert torch.autograd.gradcheck(run, given)


def test_an_output_in_place_of_the_map_gives_the_same():
    (x, t, *maps), base = inputs()
    out = functional.linear(x, *base).detach().requires_grad_()
    down, up = Linear(*maps[:2]), Linear(*maps[2:])
    found = plus_relu(out, None, t, down, up)
    torch.testing.assert_close(found, plus_relu(Linear(*base), x, t, down, up), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda o, t: plus_relu(o, None, t, down, up), (out, t))
