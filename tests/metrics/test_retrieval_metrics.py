"""Ranks and recalls."""

import torch

from mmpeft_ds.metrics.retrieval import ranks, recall, retrieval_scores

SCORES = torch.tensor([[0.9, 0.1, 0.5, 0.7], [0.2, 0.2, 0.2, 0.2]])


def test_a_query_counts_by_the_best_of_what_belongs_to_it():
    own = torch.tensor([[False, True, True, False], [True, False, False, False]])
    assert ranks(SCORES[:1], own[:1]).tolist() == [3]
    assert ranks(SCORES[1:], own[1:]).tolist() == [4], "a constant score is no success"


def test_recalls_are_percentages_and_the_median_is_a_rank():
    found = recall([1, 2, 6, 11], "vid_")
    assert found == {"vid_r1": 25, "vid_r5": 50, "vid_r10": 75, "vid_r_mean": 50, "vid_mdR": 4}
    both = retrieval_scores([1, 1], [1, 20])
    assert both["txt_r_mean"] == 100 and both["img_r_mean"] == 50 and both["r_mean"] == 75


def test_scores_that_are_no_numbers_are_never_the_best():
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, 0.1, 0.2], [0.3, inf, 0.2], [nan, nan, nan]])
    own = torch.tensor([[True, False, False], [False, True, False], [False, False, True]])
    assert ranks(scores, own).tolist() == [3, 3, 3]
    assert ranks(torch.full((1, 3), -inf), own[:1]).tolist() == [3]
