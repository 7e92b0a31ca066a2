"""What all functions that compute a frozen map and an adapter beside it have in common."""

import pytest
import torch
from torch.nn import functional

from mmpeft_ds.ops.beside_linear import Linear
from mmpeft_ds.ops.middle_sum import plus_middle
from mmpeft_ds.ops.relu_sum import plus_relu


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def base():
    return Linear(drawn(4, 6).detach(), drawn(4).detach())


def middle(x):
    return plus_middle(base(), x, drawn(2, 6), drawn(2, 3), drawn(4, 3))


def relu(x):
    return plus_relu(base(), x, x, Linear(drawn(3, 6), drawn(3)), Linear(drawn(4, 3), drawn(4)))


@pytest.fixture(params=[middle, relu], ids=lambda function: function.__name__)
def function(request):
    return request.param


def slope(output, x):
    return torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]


def test_a_second_derivative_is_refused(function):
    x = drawn(5, 6)
    slope(functional.linear(x, *base()), x).sum().backward()  # where torch records each operation it is there
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope(function(x), x).sum().backward()


def test_no_row_gives_no_row_and_gradients_of_zero(function):
    x = torch.zeros(2, 0, 6, dtype=torch.float64, requires_grad=True)
    out = function(x)
    assert out.shape == (2, 0, 4)
    out.sum().backward()
    assert x.grad.shape == x.shape
