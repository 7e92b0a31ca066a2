"""What layers share is computed once a forward, in its own graph, and recomputed blocks see that of their forward."""

import pytest
import torch

from mmpeft_ds.sites.condition import checkpoint
from mmpeft_ds.sites.once import keeping, once, values

OWNER = object()


class Counted:
    """`weight.exp()`, which counts how often it was computed."""

    def __init__(self):
        self.weight, self.times = torch.ones(1, requires_grad=True), 0

    def __call__(self):
        self.times += 1
        return self.weight.exp()

    def times_x(self, x):
        """A layer."""
        return x * once(OWNER, "all", lambda: {"all": self()}, self)


def test_once_a_forward_and_again_in_the_next_one():
    made = Counted()
    for forwards in (1, 2):
        with keeping({}):
            made.times_x(made.times_x(torch.ones(1))).backward()
        assert made.times == forwards
    made.times_x(made.times_x(torch.ones(1)))
    assert made.times == 4 and values() is None  # outside of a forward nothing is kept


def test_outside_of_a_forward_nothing_is_computed_for_the_others():
    assert once(OWNER, 1, lambda: 1 / 0, lambda: "mine") == "mine"
    with keeping({}):
        assert once(OWNER, 1, lambda: ["another's", "of all"], lambda: 1 / 0) == "of all"


def test_a_forward_without_gradient_inside_one_with_gradient_has_its_own():
    made = Counted()
    with keeping({}):
        with torch.no_grad():
            assert not made.times_x(torch.ones(1)).requires_grad
        assert made.times_x(torch.ones(1)).requires_grad
    assert made.times == 2


def test_two_forwards_before_one_backward():
    made, outputs = Counted(), []
    for x in (2.0, 3.0):
        with keeping({}):
            outputs.append(made.times_x(torch.full((1,), x)))
    for output in outputs:
        output.backward()
    torch.testing.assert_close(made.weight.grad, 5 * made.weight.exp().detach())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_recomputed_blocks_give_the_same_gradient(shared, reentrant):
    gradients = []
    for recompute in (False, True):
        made, x = Counted(), torch.full((1,), 2.0, requires_grad=True)
        with keeping({} if shared else None):
            for _ in range(3):
                block = lambda t, made=made: made.times_x(t).sin()  # noqa: E731
                x = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
        x.backward()
        gradients.append(made.weight.grad)
        if shared and not reentrant:
            assert made.times == 1
    torch.testing.assert_close(*gradients)


def test_stock_checkpointing_which_keeps_no_context_gives_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        made, x = Counted(), torch.full((1,), 2.0, requires_grad=True)
        with keeping({}):
            for _ in range(3):
                block = lambda t, made=made: made.times_x(t).sin()  # noqa: E731
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        x.backward()
        gradients.append(made.weight.grad)
    torch.testing.assert_close(*gradients)
