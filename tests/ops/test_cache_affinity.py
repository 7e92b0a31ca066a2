"""Votes of a cache against their definition, and the search of weight and sharpness."""

import pytest
import torch

from mmpeft_ds.ops import cache_affinity

LABELS = torch.tensor([3, 0, 3, 1, 0, 0])  # class 2 has no row, and the rows are in no order


def cosines(queries=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(LABELS), queries, dtype=torch.float64, generator=generator) * 2 - 1


def test_votes_are_sums_over_the_rows_of_each_class():
    cosine = cosines()
    got = cache_affinity.votes(cosine, LABELS, 4, 1.5)
    for query in range(4):
        for label in range(4):
            rows = (label == LABELS).nonzero().flatten().tolist()
            want = sum(torch.exp(-1.5 * (1 - cosine[row, query])).item() for row in rows)
            assert got[query, label].item() == pytest.approx(want, abs=1e-12)
    assert not got[:, 2].any()


def test_votes_do_not_depend_on_the_order_of_rows():
    cosine, order = cosines(), torch.tensor([5, 3, 0, 1, 4, 2])
    torch.testing.assert_close(
        cache_affinity.votes(cosine[order], LABELS[order], 4, 1.0), cache_affinity.votes(cosine, LABELS, 4, 1.0)
    )


def test_gradients_of_votes():
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    cosine = cosines().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, b: cache_affinity.votes(c, LABELS, 4, b), (cosine, beta))


def test_no_queries_give_no_votes():
    assert cache_affinity.votes(cosines(0), LABELS, 4, 1.0).shape == (0, 4)


def test_the_grid_starts_at_a_tenth_and_never_reaches_its_end():
    values = cache_affinity.grid(7.0, 200)
    assert len(values) == 200 and values[0] == 0.1
    assert values[1] == pytest.approx(0.1 + 6.9 / 200) and values[-1] == pytest.approx(7.0 - 6.9 / 200)


def brute(text, cosine, targets, sharpnesses, weights):
    """The published loop: a pair replaces the best one only if it is strictly better."""
    best, found = 0, None
    for sharpness in sharpnesses:
        for weight in weights:
            logits = text + weight * cache_affinity.votes(cosine, LABELS, 4, sharpness)
            right = int((logits.argmax(1) == targets).sum())
            if right > best:
                best, found = right, (sharpness, weight, right)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_what_the_published_loop_finds_in_pieces_too(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(30, 4, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 4, (30,), generator=generator)
    grids = cache_affinity.grid(12.0, 9), cache_affinity.grid(5.0, 7)
    cosine = cosines(30, seed)
    want = brute(text, cosine, targets, *grids)
    assert cache_affinity.search(text, cosine, LABELS, targets, *grids) == want
    monkeypatch.setattr(cache_affinity, "CHUNK", 7 * len(LABELS))
    assert cache_affinity.search(text, cosine, LABELS, targets, *grids) == want


def test_the_first_of_equally_good_pairs_is_kept():
    text = torch.zeros(1, 4, dtype=torch.float64)
    right = cosines(1).fill_(0.0)  # three rows of class 0 outvote the others at every weight and sharpness
    assert cache_affinity.search(text, right, LABELS, torch.tensor([0]), [2.0, 1.0], [3.0, 0.5]) == (2.0, 3.0, 1)
    assert cache_affinity.search(text, right, LABELS, torch.tensor([2]), [2.0, 1.0], [3.0, 0.5]) is None
