"""Soft targets, masked keys, hard negatives and the matching loss against their definitions."""

import torch
from torch.nn.functional import cross_entropy, normalize

from mmpeft_ds.ops import contrastive

IDS, KEYS = torch.tensor([3, 5, 3]), torch.tensor([3, 5, 3, -100])


def features(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=1)


def test_hard_targets_share_between_keys_of_one_id():
    assert torch.equal(
        contrastive.soft_targets(IDS, KEYS), torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0]])
    )


def test_the_teacher_is_mixed_in_and_gets_no_gradient():
    teacher = torch.randn(3, 4, requires_grad=True)
    mixed = contrastive.soft_targets(IDS, KEYS, teacher, alpha=0.25)
    hard = contrastive.soft_targets(IDS, KEYS)
    torch.testing.assert_close(mixed, 0.25 * teacher.softmax(1) + 0.75 * hard)
    assert not mixed.requires_grad


def test_one_hot_targets_give_the_usual_cross_entropy():
    logits, label = torch.randn(3, 4), torch.tensor([2, 0, 1])
    got = contrastive.soft_cross_entropy(logits, torch.eye(4)[label])
    torch.testing.assert_close(got, cross_entropy(logits, label, reduction="none"))


def test_keys_that_do_not_count_are_as_if_they_were_not_there():
    query, keys = features(3, 0).requires_grad_(), features(4, 1)
    keep = torch.tensor([True, True, False, True])

    def loss(keys, ids, keep):
        logits = contrastive.similarities(query, keys, 0.07, keep)
        return contrastive.soft_cross_entropy(
            logits, contrastive.soft_targets(IDS, ids, keep_K=keep, dtype=keys.dtype)
        )

    with_mask, without = loss(keys, KEYS, keep), loss(keys[keep], KEYS[keep], None)
    torch.testing.assert_close(with_mask, without)
    grads = [torch.autograd.grad(x.sum(), query)[0] for x in (with_mask, without)]
    torch.testing.assert_close(*grads)


def test_negatives_never_have_the_id_of_the_query():
    weights = contrastive.negative_weights(features(3, 0), features(4, 1), IDS, KEYS, 0.07)
    full = (features(3, 0) @ features(4, 1).T / 0.07).softmax(1)
    same = IDS[:, None] == KEYS
    assert not weights[same].any()
    torch.testing.assert_close(weights[~same], full[~same])  # not normalised again


def test_draws_follow_the_weights():
    weights = torch.tensor([0.1, 0.0, 0.3, 0.1]).expand(5000, -1)
    uniform = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    index, possible = contrastive.draw(weights, weights > 0, uniform)
    shares = torch.bincount(index, minlength=4) / 5000
    assert possible.all() and (shares - torch.tensor([0.2, 0.0, 0.6, 0.2])).abs().max() < 0.02
    edge, _ = contrastive.draw(weights[:2], weights[:2] > 0, torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64))
    assert edge.tolist() == [0, 3]


def test_a_row_without_weight_still_draws_what_is_allowed_or_says_that_nothing_is():
    allowed = torch.tensor([[False, True, True], [False, False, False]])
    index, possible = contrastive.draw(torch.zeros(2, 3), allowed, torch.tensor([0.9, 0.9]))
    assert index[0] == 2 and possible.tolist() == [True, False]


def test_the_mean_of_the_matching_loss_is_that_over_all_rows():
    logits = torch.randn(9, 2)
    labels = torch.tensor([1] * 3 + [0] * 6)
    torch.testing.assert_close(contrastive.matching_loss(logits).mean(), cross_entropy(logits, labels))
    some = torch.tensor([True] * 5 + [False])
    each = cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(contrastive.matching_loss(logits, some)[2], (each[2] + each[5]) / 3)


def test_the_temperature_keeps_within_its_bounds():
    assert (
        contrastive.clamp_temperature(torch.tensor([1e-6, 0.07, 3.0])).tolist()
        == torch.tensor([0.001, 0.07, 0.5]).tolist()
    )
