"""The condition follows its forward: beams, checkpointing, two forwards before one backward."""

import pytest
import torch

from mmpeft_ds.sites.condition import Condition, checkpoint, conditioned, current


def test_rows_follow_beam_expansion():
    condition = Condition(torch.arange(4.0).view(2, 1, 2), torch.tensor([[True], [False]]))
    wide = condition.expand_to(6)
    assert wide.tokens[:, 0, 0].tolist() == [0, 0, 0, 2, 2, 2]
    assert wide.mask[:, 0].tolist() == [True] * 3 + [False] * 3
    assert condition.expand_to(2) is condition
    with pytest.raises(ValueError, match="no multiple"):
        condition.expand_to(3)


def test_the_condition_ends_with_its_forward_even_on_error():
    with pytest.raises(RuntimeError), conditioned(Condition(torch.zeros(1, 1, 1))):
        assert current() is not None
        raise RuntimeError
    assert current() is None


def test_recomputation_sees_the_condition_of_its_own_forward():
    seen = []

    def block(x):
        seen.append(current().tokens.item())
        return x * current().tokens.view(1)

    x = torch.ones(1, requires_grad=True)
    outs = []
    for value in (2.0, 3.0):
        with conditioned(Condition(torch.full((1, 1, 1), value))):
            outs.append(checkpoint(block, x))
    sum(outs).backward()
    assert seen[:2] == [2.0, 3.0] and sorted(seen[2:]) == [2.0, 3.0]
    assert x.grad.item() == 5.0


@pytest.mark.parametrize("field", ["tokens", "encoder"])
def test_reentrant_checkpointing_refuses_a_condition_that_needs_gradient(field):
    x = torch.ones(1, requires_grad=True)
    with conditioned(Condition(**{field: torch.ones(1, 1, 1, requires_grad=True)})):
        with pytest.raises(ValueError, match="reentrant"):
            checkpoint(lambda t: t, x, use_reentrant=True)
    with conditioned(Condition(**{field: torch.ones(1, 1, 1)})):
        checkpoint(lambda t: t * 2, x, use_reentrant=True)


def test_reentrant_checkpointing_behind_frozen_embeddings_trains_what_is_inside():
    weight = torch.nn.Parameter(torch.tensor(3.0))
    x = torch.ones(2, 3, 4)
    checkpoint(lambda t: t * weight, x, use_reentrant=True).sum().backward()
    assert weight.grad.item() == 24 and not x.requires_grad
    with torch.no_grad():
        assert not checkpoint(lambda t: t * weight, x, use_reentrant=True).requires_grad
