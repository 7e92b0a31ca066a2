"""A frozen linear layer with its low-rank term as one function: the numbers and gradients of the plain form."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mmpeft_ds.ops.low_rank_linear import low_rank_linear


def factors(bias: bool, shape: tuple[int, ...] = (2, 3, 5)):
    draw = torch.Generator().manual_seed(0)
    x, weight, shift, down, up = (
        torch.randn(*size, generator=draw, dtype=torch.float64) for size in (shape, (4, 5), (4,), (2, 5), (4, 2))
    )
    return x, weight, shift if bias else None, down, up


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_output_is_that_of_the_plain_form(bias, shape):
    x, weight, shift, down, up = factors(bias, shape)
    plain = functional.linear(x, weight, shift) + functional.linear(functional.linear(x, down), up) * 0.7
    torch.testing.assert_close(low_rank_linear(x, weight, shift, down, up, 0.7), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", [("x", "down", "up"), ("down", "up"), ("x",), ("x", "up"), ("x", "down")])
def test_gradients_are_those_of_finite_differences(trained):
    x, weight, shift, down, up = factors(True)
    tensors = {"x": x, "down": down, "up": up}
    for name in trained:
        tensors[name].requires_grad_()

    def run(x, down, up):
        return low_rank_linear(x, weight, shift, down, up, 0.7)

    assert torch.autograd.gradcheck(run, (x, down, up))


def test_a_transposed_input_and_an_expanded_gradient_are_read_right():
    x, weight, shift, down, up = factors(False, (5, 6))
    seen = [x.T.detach().requires_grad_(), x.T.contiguous().requires_grad_()]
    for mine in seen:
        low_rank_linear(mine, weight, shift, down, up, 0.7).sum().backward()
    torch.testing.assert_close(seen[0].grad, seen[1].grad, rtol=1e-12, atol=1e-12)
