"""GraphAdapter's restated form against the whole graphs that the paper draws."""

import pytest
import torch

from mmpeft_ds.ops import graph_adapter as ops

C, D = 8, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("same_bank", [True, False])
def test_what_a_query_receives_is_its_row_of_the_normalised_graph(groups, same_bank):
    text = draw(C, D)
    bank = text if same_bank else draw(C, D, seed=1)
    got = ops.aggregated(text, bank, groups)
    for group in range(groups):
        _, adjacency = ops.query_graphs(text, bank, groups, group)
        nodes = torch.cat([text[:, None], bank[group::groups].expand(C, -1, -1)], 1)
        torch.testing.assert_close(got[:, group], (adjacency[:, :1] @ nodes)[:, 0], atol=1e-14, rtol=1e-12)


def test_groups_take_every_gth_class_and_not_neighbours():
    text, bank = draw(C, D), draw(C, D, seed=1)
    nodes = torch.cat([text[:, None], bank[:4].expand(C, -1, -1)], 1)  # the first half, in place of every second class
    _, adjacency = ops.query_graphs(text, bank[:4], 1, 0)
    wrong = (adjacency[:, :1] @ nodes)[:, 0]
    assert (ops.aggregated(text, bank, 2)[:, 0] - wrong).abs().max() > 1e-2


def test_graphs_are_symmetric_with_unit_cosines_and_no_negative_edge():
    raw, adjacency = ops.query_graphs(draw(C, D), draw(C, D, seed=1), 4, 2)
    assert raw.shape == adjacency.shape == (C, 3, 3)
    torch.testing.assert_close(raw.diagonal(dim1=1, dim2=2), torch.ones(C, 3, dtype=torch.float64))
    torch.testing.assert_close(adjacency, adjacency.transpose(1, 2))
    assert (raw < 0).any() and not (adjacency[raw < 0]).any()
    degree = raw.clamp(min=0).sum(2) + 1
    torch.testing.assert_close(adjacency[:, 0, 0], 2 / degree[:, 0])


def test_a_class_without_images_has_no_edges_and_stays_finite():
    text, bank = draw(C, D), draw(C, D, seed=1)
    bank[3] = 0
    with_hole = ops.aggregated(text, bank, 4)
    assert with_hole.isfinite().all()
    shortened, _ = ops.query_graphs(text, bank, 4, 3)
    assert not shortened[:, 0, 1].any()  # class 3 comes first in group 3


def test_classes_that_do_not_divide_form_one_group():
    assert [ops.groups_of(c, 4) for c in (8, 10, 4, 3)] == [4, 1, 4, 1]


def test_permuting_the_classes_permutes_what_they_receive():
    text, bank, order = draw(C, D), draw(C, D, seed=1), torch.tensor([3, 1, 0, 7, 2, 6, 4, 5])
    torch.testing.assert_close(ops.aggregated(text[order], bank[order], 1), ops.aggregated(text, bank, 1)[order])


def test_edges_are_detached_and_the_refined_text_has_the_right_gradients():
    text = draw(C, D).requires_grad_()
    assert not ops.cosine(text, text).requires_grad
    received = ops.aggregated(text, text, 2).detach(), ops.aggregated(text, draw(C, D, seed=1), 2).detach()
    weights = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(D, D), (D, D), (C, D), (C, D)])]
    assert torch.autograd.gradcheck(lambda *w: ops.refined(text.detach(), *received, *w, 0.7, 0.6), weights)
    whole = ops.refined(text, *received, *weights, 0.7, 1.0)
    torch.testing.assert_close(whole, text)  # beta 1 leaves the text as it is
