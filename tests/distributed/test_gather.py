"""All-rank gather: rows in rank order, gradients summed over ranks, ranks of different sizes, sub-groups."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmpeft_ds.distributed.gather import gather_rows, gather_sizes
from tests.helpers.forked_ranks import in_ranks

SIZES = [3, 1, 0]


def rows(rank):
    return torch.randn(SIZES[rank], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def on_rank(rank):
    x = rows(rank).requires_grad_()
    everyone = gather_rows(x)
    # one factor a rank, so that a gradient of this rank alone would show
    ((rank + 1) * everyone.pow(2)).sum().backward()
    return everyone.detach().numpy(), x.grad.numpy(), gather_sizes([rank, 7 * rank], "cpu")


@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_ranks_see_all_rows_and_get_the_gradient_of_all_ranks(ranks):
    whole = np.concatenate([rows(r).numpy() for r in range(ranks)])
    for rank, (everyone, grad, sizes) in enumerate(in_ranks(on_rank, ranks=ranks)):
        np.testing.assert_array_equal(everyone, whole)
        np.testing.assert_allclose(grad, sum(range(1, ranks + 1)) * 2 * rows(rank).numpy(), atol=1e-14)
        assert sizes == [[r, 7 * r] for r in range(ranks)]


def test_alone_the_rows_themselves_come_back():
    x = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(x) is x and gather_sizes([4], "cpu") == [[4]]


def in_pairs(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    group = groups[rank // 2]
    x = torch.full((1, 1), float(rank), requires_grad=True)
    everyone = gather_rows(x, group=group)
    everyone.sum().backward()
    return everyone.detach().numpy().ravel().tolist(), float(x.grad)


def test_a_process_group_keeps_to_itself():
    assert in_ranks(in_pairs, ranks=3) == [([0.0, 1.0], 2.0), ([0.0, 1.0], 2.0), ([2.0], 1.0)]


def test_integers_travel_too():
    got = in_ranks(lambda rank: gather_rows(torch.tensor([rank + 2**40])).tolist())
    assert got == [[2**40, 2**40 + 1]] * 2
