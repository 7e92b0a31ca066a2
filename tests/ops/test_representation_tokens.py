"""Tokens after the first token: where they stand, who sees them, which logits count."""

import itertools

import pytest
import torch

from mmpeft_ds.ops import representation_tokens as ops

B, N, K, D = 2, 4, 3, 5
PLACES = [0, *range(1 + K, N + K)]  # of the row's own tokens once the others are in


def test_tokens_stand_behind_the_first_and_take_the_place_of_those_before():
    hidden, tokens, newer = torch.randn(B, N, D), torch.randn(K, D), torch.randn(K, D)
    once = ops.insert_tokens(hidden, tokens, 0)
    twice = ops.insert_tokens(once, newer, K)
    for long, wanted in ((once, tokens), (twice, newer)):
        own, taken = ops.take_tokens(long, K)
        assert torch.equal(own, hidden) and torch.equal(taken, wanted.expand(B, -1, -1))
        assert torch.equal(long[:, PLACES], hidden) and torch.equal(long[:, 1 : 1 + K], taken)
    assert ops.insert_tokens(hidden.bfloat16(), tokens, 0).dtype == torch.bfloat16


def seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > -1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_a_mask_over_all_pairs_hides_what_it_hid_and_shows_the_new_tokens(causal, kind):
    padding = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    allowed = padding[:, None, None, :].expand(B, 1, N, N)
    if causal:
        allowed = allowed & torch.ones(N, N, dtype=torch.bool).tril()
    mask = allowed if kind == "bool" else torch.zeros(B, 1, N, N).masked_fill(~allowed, torch.finfo().min)
    made = ops.mask_of_inserted(mask, K, causal)
    assert made.shape == (B, 1, N + K, N + K) and made.dtype == mask.dtype
    got, new = seen(made), set(range(1, 1 + K))
    for row, query, key in itertools.product(range(B), range(N + K), range(N + K)):
        if key in new:
            want = key <= query or not causal
        elif query in new:
            want = bool(allowed[row, 0, 0, PLACES.index(key)])
        else:
            want = bool(allowed[row, 0, PLACES.index(query), PLACES.index(key)])
        assert bool(got[row, 0, query, key]) == want, (row, query, key)


def test_causal_attention_over_the_longer_row_is_the_mask_that_is_made():
    """Where there is no mask, attention that is causal by itself must do the same."""
    made = ops.mask_of_inserted(torch.ones(1, 1, N, N, dtype=torch.bool).tril(), K, True)
    assert torch.equal(made[0, 0], torch.ones(N + K, N + K, dtype=torch.bool).tril())
    assert ops.mask_of_inserted(None, K, True) is None


def test_masks_of_keys_alone_grow_by_keys_that_are_seen():
    flat = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert ops.mask_of_inserted(flat, 2, True).tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
    wide = flat.bool()[:, None, None]
    assert ops.mask_of_inserted(wide, 2, False)[:, 0, 0].tolist() == [[True] * 5 + [False], [True] * 3 + [False] * 3]


def test_new_classes_are_scored_by_the_class_feature_alone():
    of_class, of_tokens = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    made = ops.decoupled_logits(of_class, of_tokens, torch.tensor([1.0, 0.0, 1.0]), 0.75)
    assert made.tolist() == [[0.75 + 2.5, 2.0, 2.25 + 7.5]]


def test_the_distance_to_frozen_features_is_one_minus_the_cosine():
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    made = ops.frozen_distance(x, torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]]))
    torch.testing.assert_close(made, torch.tensor([0.0, 2.0, 1 - 0.5**0.5]))
