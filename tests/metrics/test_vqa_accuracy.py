"""The VQA measure on examples worked out by hand."""

import pytest

from mmpeft_ds.metrics.vqa import CONTRACTIONS, answer_score, normalize_answer, soft_score, vqa_accuracy


@pytest.mark.parametrize(
    "votes, expected",
    # v votes for the prediction: v of the ten subsets see v-1 of them, the others v
    [
        (0, 0.0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        (3, (3 * (2 / 3) + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_leave_one_out_over_ten_annotators(votes, expected):
    answers = ["red"] * votes + ["blue"] * (10 - votes)
    assert vqa_accuracy("red", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("The Red Bus.", "red bus"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("p.m.", "pm"),
        ("black/white", "black white"),
        ("yes, it is", "yes it is"),
        ("dont know", "don't know"),
        ("well", "well"),
        ("a\tcat\n", "cat"),
        ("t-shirt", "t shirt"),
    ],
)
def test_normalisation(answer, normal):
    assert normalize_answer(answer) == normal


def test_answers_are_normalised_unless_all_annotators_agree():
    assert vqa_accuracy("2", ["two"] * 5 + ["3"] * 5) == 1.0
    assert vqa_accuracy("2", ["two"] * 10) == 0.0


def test_one_answer_is_compared_plainly():
    assert answer_score("Yes", ["yes "]) == 1.0
    assert answer_score("yes", ["no"]) == 0.0
    assert answer_score("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="two annotators"):
        vqa_accuracy("yes", ["yes"])


def test_soft_targets_are_those_of_the_published_label_files():
    assert [soft_score(n, 10) for n in (1, 2, 3, 4, 10)] == pytest.approx([0.3, 0.6, 0.9, 1.0, 1.0])
    assert soft_score(1, 1) == 1.0


def test_the_table_of_contractions_is_the_evaluators_and_no_rule():
    assert len(CONTRACTIONS) == 120
    kept = ["hell", "well", "id", "shed", "wed", "its", "were", "couldntve", "im"]  # Im stands there with a capital
    assert [normalize_answer(word) for word in kept] == kept
    assert normalize_answer("Shouldn'tve yall'd've somebody'd") == "shouldn't've y'all'd've somebodyd"


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "older", "exact"),
    [
        ("Yes", ["yes"] * 10, 0.0, 1.0, 0.0),  # all agree: the present evaluator normalises nothing
        ("two", ["two"] * 5 + ["3"] * 5, 1.0, 0.0, 1.0),  # the older one makes "2" of the prediction alone
        ("2", ["two"] * 5 + ["3"] * 5, 1.0, 0.0, 0.0),
        ("the dog", ["dog"] * 9 + ["cat"], 1.0, 1.0, 0.0),
        ("dog", ["the dog"] * 9 + ["cat"], 1.0, 0.0, 0.0),
        ("t shirt", ["t-shirt"] * 2 + ["top"] * 8, 0.6, 0.6, 0.0),
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6, 0.6, 0.6),
        ("new\nyork", ["new york"] * 10, 1.0, 1.0, 0.0),
    ],
)
def test_the_evaluators_differ_in_what_they_normalise(prediction, answers, official, older, exact):
    for measure, score in (("official", official), ("2017", older), ("exact", exact)):
        assert vqa_accuracy(prediction, answers, measure) == pytest.approx(score), measure


def test_at_most_32_periods_go_and_a_comma_between_digits_deletes_every_mark():
    assert normalize_answer("." * 40) == "." * 8
    assert normalize_answer("1,000 t-shirts") == "1000 tshirts"
    assert normalize_answer(".5 5. 3.5") == ".5 5 3.5"


def test_one_answer_is_compared_to_the_letter_only_where_asked():
    assert answer_score("Yes ", ["yes"]) == 1 and answer_score("Yes", ["yes"], "exact") == 0
