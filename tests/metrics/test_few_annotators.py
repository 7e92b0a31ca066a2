"""Questions with fewer than ten annotators: the official measure, and accuracy_any beside it."""

import pytest

from mmpeft_ds.metrics.vqa import answer_score, any_score
from mmpeft_ds.tasks.common.questions import accuracies


def row(prediction, *answers):
    return {"type": "", "answers": list(answers), "prediction": prediction}


def test_a_right_answer_to_few_annotators_scores_1_by_accuracy_any_alone():
    rows = [row("Red", "red", "red"), row("a dog", "dog", "cat", "cow"), row("blue", "red", "crimson")]
    scores = accuracies(rows)
    assert scores["accuracy_any"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(sum(answer_score(r["prediction"], r["answers"]) for r in rows) / 3)
    assert scores["accuracy"] < scores["accuracy_any"]
    assert any_score("two dogs", ["2 dogs"]) == 1 and any_score("dog", ["dogs"]) == 0


def test_ten_annotators_or_one_have_the_usual_measure_alone():
    assert "accuracy_any" not in accuracies([row("red", *["red"] * 10), row("red", "red")])
