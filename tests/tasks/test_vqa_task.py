"""Questions and answers: targets, weights, losses, rows, scores, priors."""

import math
from types import SimpleNamespace

import pytest
import torch

from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.tasks.common.questions import accuracies
from mmpeft_ds.tasks.vqa.task import Options, Vqa

LABELS = ["yes", "no", "red", "2"]
TEN = ["red"] * 5 + ["no"] * 3 + ["yes", "purple"]
RECORD = {
    "questions": [
        {"question": "is it red?", "answers": ["yes"], "type": "yes/no", "question_id": 7},
        {"question": "what color is it?", "answers": TEN, "type": "color"},
        {"question": "what is it?", "answers": ["a cat"]},
    ]
}


def batch(task, *records, weights=None):
    samples = []
    for i, record in enumerate(records):
        texts, targets = task.read(record, torch.Generator().manual_seed(0))
        weight = 1.0 if weights is None else weights[i]
        samples.append(Sample(f"set/{i}", weight, [], texts, targets, record))
    return pack(samples, lambda i: {}, lambda t: {"input_ids": torch.zeros(len(t), 1)}, task.collate)


def outputs(logits):
    return SimpleNamespace(logits=logits)


def random_logits(rows, dtype=torch.float64):
    return torch.randn(rows, len(LABELS), generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_binary_loss_is_the_mean_over_answers_summed_over_questions():
    task = Vqa(Options(loss="bce"), LABELS)
    packed = batch(task, RECORD)
    logits = random_logits(3)
    target = torch.tensor([[1, 0, 0, 0], [0.3, 0.9, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(packed.targets["score"], target)
    p = logits.sigmoid()
    by_hand = -(target * p.log() + (1 - target) * (1 - p).log()).mean(1).sum()
    torch.testing.assert_close(task.loss(outputs(logits), packed), by_hand, rtol=1e-6, atol=0)
    assert task.weight(packed) == 3


def test_cross_entropy_takes_the_answer_of_most_annotators_and_leaves_out_unknown_ones():
    task = Vqa(Options(loss="ce"), LABELS)
    packed = batch(task, RECORD)
    assert packed.targets["label"].tolist() == [0, 2, -1]
    logits = random_logits(3)
    by_hand = -(logits.log_softmax(1)[0, 0] + logits.log_softmax(1)[1, 2])
    torch.testing.assert_close(task.loss(outputs(logits), packed), by_hand, rtol=1e-12, atol=0)
    assert task.weight(packed) == 2


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_losses_of_two_batches_add_up_and_weight_zero_is_absent(loss):
    task = Vqa(Options(loss=loss), LABELS)
    both = batch(task, RECORD, RECORD, weights=[1.0, 0.0])
    logits = random_logits(6)
    poisoned = logits.clone()
    poisoned[3:] = float("nan")
    alone = task.loss(outputs(logits[:3]), batch(task, RECORD))
    torch.testing.assert_close(task.loss(outputs(poisoned), both), alone)
    assert task.weight(both) == task.weight(batch(task, RECORD))
    assert {r["sample_id"] for r in task.predict(outputs(logits), both)} == {"set/0"}


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_the_weight_of_a_question_is_a_factor_of_its_loss_and_it_counts_as_one(loss):
    task = Vqa(Options(loss=loss), LABELS)
    asked = RECORD["questions"][:2]
    weighted = batch(task, {"questions": [asked[0], asked[1] | {"weight": 0.25}]})
    logits = random_logits(2)
    alone = [batch(task, {"questions": [question]}) for question in asked]
    first, second = (task.loss(outputs(logits[i : i + 1]), one) for i, one in enumerate(alone))
    torch.testing.assert_close(task.loss(outputs(logits), weighted), first + second / 4)
    assert task.weight(weighted) == 2


def test_losses_are_float32_at_least_and_keep_float64():
    task = Vqa(Options(), LABELS)
    packed = batch(task, RECORD)
    assert task.loss(outputs(random_logits(3, torch.bfloat16)), packed).dtype == torch.float32
    assert task.loss(outputs(random_logits(3)), packed).dtype == torch.float64


def test_a_dummy_target_collates_with_real_ones():
    for loss in ("bce", "ce"):
        task = Vqa(Options(loss=loss), LABELS)
        _, targets = task.read(RECORD, torch.Generator())
        assert all(len(t) == 4 for t in task.collate([*targets, task.dummy_target()]).values())


def test_rows_carry_the_question_and_score_by_type():
    task = Vqa(Options(), LABELS)
    packed = batch(task, RECORD)
    logits = torch.full((3, 4), -1.0)
    logits[0, 0] = logits[1, 1] = logits[2, 3] = 1.0
    rows = task.predict(outputs(logits), packed)
    assert [r["prediction"] for r in rows] == ["yes", "no", "2"]
    assert rows[0]["question_id"] == 7 and rows[1]["answers"] == TEN
    scores = task.score(rows)
    assert scores["accuracy_yes_no"] == 1.0 and scores["accuracy_color"] == pytest.approx(0.9)
    assert scores["accuracy"] == pytest.approx((1 + 0.9 + 0) / 3)


def test_a_question_limit_draws_by_the_generator_and_keeps_rows_right():
    task = Vqa(Options(max_questions=1), LABELS)
    drawn = {task.read(RECORD, torch.Generator().manual_seed(s))[0][0] for s in range(20)}
    assert len(drawn) == 3
    packed = batch(task, RECORD)
    (row,) = task.predict(outputs(random_logits(1)), packed)
    asked = next(q for q in RECORD["questions"] if q["question"] == row["text"])
    assert row["answers"] == asked["answers"]


def test_priors_know_the_question_but_no_image():
    def record(*pairs):
        return {
            "questions": [
                {"question": q, "answers": [a], "type": "yes/no" if a in ("yes", "no") else "color"} for q, a in pairs
            ]
        }

    train = [
        record(
            ("is it red?", "no"),
            ("is it red?", "no"),
            ("is it  RED?", "yes"),
            ("color?", "red"),
            ("color?", "red"),
            ("color?", "red"),
        )
    ]
    test = [record(("is it red?", "no"), ("is it red?", "yes"), ("color?", "red"), ("new?", "blue"))]
    got = Vqa(Options(), LABELS).baselines(train, test)
    assert got == {
        "majority": 0.25,
        "majority_yes_no": 0.0,
        "majority_color": 0.5,
        "question_only": 0.5,
        "question_only_yes_no": 0.5,
        "question_only_color": 0.5,
    }


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"questions": "is it?"},
        {"questions": [{"answers": ["a"]}]},
        {"questions": [{"question": "q", "answers": [1]}]},
    ],
)
def test_a_record_of_the_wrong_shape_is_a_bad_sample(record):
    with pytest.raises(BadSample):
        Vqa(Options(), LABELS).read(record, torch.Generator())


@pytest.mark.parametrize(
    "options, labels",
    [({}, None), ({"loss": "mse"}, LABELS), ({"num_answers": 9}, LABELS), ({"max_questions": -1}, LABELS)],
)
def test_impossible_options_are_refused_in_one_line(options, labels):
    with pytest.raises(BadInput) as error:
        Vqa(Options(**options), labels)
    assert "\n" not in str(error.value)


def test_published_scores_are_the_targets_and_not_what_the_answers_would_give():
    task = Vqa(Vqa.Options(), ["2", "red"])
    asked = {"question": "how many?", "answers": ["two"] * 10}
    without = task.read_all({"questions": [asked]}, None)[1][0]["scores"]
    assert without == {0: 1.0}  # "two" is "2" once normalised
    with_scores = {**asked, "scores": {"red": 0.3, "unlisted": 1.0}}
    assert task.read_all({"questions": [with_scores]}, None)[1][0]["scores"] == {1: 0.3}
    with pytest.raises(BadSample, match="scores"):
        task.read_all({"questions": [{**asked, "scores": {"red": "high"}}]}, None)


def test_question_types_of_any_script_have_scores_of_their_own():
    rows = [
        {"type": kind, "answers": ["a"], "prediction": said}
        for kind, said in (("数量", "a"), ("颜色", "b"), ("yes/no", "a"), ("yes no", "b"), ("?!", "a"))
    ]
    scores = accuracies(rows)
    assert scores["accuracy_数量"] == 1 and scores["accuracy_颜色"] == 0
    assert {scores["accuracy_yes_no"], scores["accuracy_yes_no_2"]} == {0, 1} and scores["accuracy_type"] == 1


def test_accuracy_by_question_type_stands_in_the_report_and_not_in_the_table():
    task = Vqa(Options(), LABELS)
    asked = [("what is", "a"), ("what is", "b"), ("none of the above", "a"), ("is the", None)]
    rows = [
        {"type": "other", "question_type": kind, "answers": ["a"] if said else [], "prediction": said or "a"}
        for kind, said in asked
    ]
    assert task.grouped(rows)["question_type"] == {
        "none of the above": {"questions": 1, "accuracy": 1.0},
        "what is": {"questions": 2, "accuracy": 0.5},
    }
    assert set(task.score(rows)) == {"accuracy", "accuracy_other"}
    assert task.grouped([{k: v for k, v in row.items() if k != "question_type"} for row in rows]) == {}


def test_logits_that_are_no_numbers_give_no_accuracy_at_all():
    task = Vqa(Options(), LABELS)
    packed = batch(task, RECORD)
    logits = torch.full((3, 4), torch.nan)  # argmax would take "yes", which is right for the first question
    assert math.isnan(task.score(task.predict(outputs(logits), packed))["accuracy"])


def test_an_answer_that_stands_twice_in_the_list_is_refused():
    with pytest.raises(BadInput, match="'yes' names the classes 0, 2"):
        Vqa(Options(), ["yes", "no", "yes"])
