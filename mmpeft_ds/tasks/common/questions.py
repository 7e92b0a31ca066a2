"""Questions and answers: the base of tasks on records with `questions`, and reading, rows, scores and priors of them.

`questions` is a list of {question, answers (1 or 10), question_id?, type?, scores?, weight?}. `scores`, {answer:
score}, are the soft targets where the data set publishes them, or preparation has made them by its rule; else they are
made of the answers. `weight` is a factor of the question's loss, 1 where it is not given; the sum of the losses is
still divided by the number of questions.
"""

from __future__ import annotations

import abc
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.parsing import check_questions
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.metrics.vqa import (
    ANNOTATORS,
    MEASURES,
    Measure,
    answer_score,
    any_score,
    normalize_answer,
    soft_score,
)
from mmpeft_ds.tasks.base import TaskBase
from mmpeft_ds.tasks.common.rows import NOT_FINITE, nan_unless_finite


@dataclass(frozen=True)
class Asked:
    """A question of a record: its text, the annotators' answers, the published score of each answer or None, and the
    weight of its loss."""

    question: str
    answers: list[str]
    scores: dict[str, float] | None = None
    weight: float = 1.0


class QuestionTask(TaskBase):
    """Base of such tasks: the options have `max_questions`, and targets hold `question`, its number in the record."""

    main_metric = "accuracy"
    example_text = "what is in the picture?"
    unit, items = "questions", "questions"
    prompt_kind, target_kind = "question", "answer"
    no_weight = "no question has an answer that counts"

    def __init__(self, options: Any, labels: list[str] | None):
        super().__init__(options, labels)
        if options.max_questions < 0:
            raise BadInput(f"task.max_questions: {options.max_questions}. Use 0 for all or a positive number.")
        if options.vqa_measure not in MEASURES:
            raise BadInput(f"task.vqa_measure: {options.vqa_measure!r}. Use one of {', '.join(MEASURES)}.")

    @abc.abstractmethod
    def read_questions(
        self, record: dict[str, Any], most: int, generator: torch.Generator | None
    ) -> tuple[list[Any], list[Any]]:
        """Texts and targets of at most `most` questions of a record, 0 = all; see `drawn_questions`.

        Args:
            generator: None in evaluation, where nothing is drawn.
        """

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Any], list[Any]]:
        """Questions of one sample in training, at most `max_questions` of them."""
        return self.read_questions(record, self.options.max_questions, generator)

    def read_all(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Any], list[Any]]:
        """All questions of one sample, for evaluation."""
        return self.read_questions(record, 0, None)

    def scored(self, rows: list[dict[str, Any]]) -> int:
        """Questions that somebody has answered."""
        return sum(bool(_judges(row)) for row in rows)

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """A record with these questions, none of them answered, and their targets."""
        record = {"questions": [{"question": text, "answers": []} for text in texts]}
        return record, self.read_all(record, torch.Generator())[1]

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy` and `accuracy_<type>`: official VQA accuracy where several annotators answered, else plain."""
        return nan_unless_finite(rows, accuracies(rows, self.options.vqa_measure))

    def grouped(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """`question_type`: each type as the annotations spell it -> its `accuracy` and number of `questions`; VQAv2
        has 65. Nothing where the annotations have none."""
        of_type: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row.get("question_type") and _judges(row):
                of_type[row["question_type"]].append(row)
        of_kind = {kind: {"questions": len(mine), **self.score(mine)} for kind, mine in sorted(of_type.items())}
        names = ("questions", "accuracy")
        return {"question_type": {k: {n: v[n] for n in names} for k, v in of_kind.items()}} if of_kind else {}

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`majority` and `question_only`: answers without a model, overall and by question type."""
        return priors(train, test, self.options.vqa_measure)


def drawn_questions(
    record: dict[str, Any], most: int, generator: torch.Generator | None
) -> Iterator[tuple[int, Asked]]:
    """Number and content of `most` questions of a record, drawn and in order; 0 = all. Raises BadSample."""
    questions = record.get("questions")
    if not isinstance(questions, list):
        raise BadSample("field", "`questions` is no list")
    check_questions(record)
    numbers = range(len(questions))
    if 0 < most < len(questions):
        numbers = sorted(torch.randperm(len(questions), generator=generator)[:most].tolist())
    for number in numbers:
        yield number, _question(questions[number])


def loss_weights(targets: list[Any]) -> torch.Tensor:
    """(T,) float32: `weight` of each target, 1 for one without, such as that of a text that only fills up."""
    return torch.tensor([target.get("weight", 1.0) for target in targets], dtype=torch.float32)


def soft_scores(asked: Asked, known: dict[str, Any] | None) -> dict[str, float]:
    """Answer -> soft score, highest first; with `known`, only the answers in it. Without published scores an answer
    that is not in it counts as the answer that it normalises to."""
    if asked.scores is not None:
        listed = {answer: score for answer, score in asked.scores.items() if known is None or answer in known}
        return dict(sorted(listed.items(), key=lambda item: -item[1]))
    answers = asked.answers
    votes: Counter[str] = Counter()
    for answer in answers:
        counted = answer if known is None or answer in known else normalize_answer(answer)
        if known is None or counted in known:
            votes[counted] += 1
    # Counter keeps the order of first occurrence among equals, which is the order of the record.
    return {answer: soft_score(count, len(answers)) for answer, count in votes.most_common()}


def answer_rows(
    batch: PackedBatch,
    predictions: list[str],
    spelled_as: Callable[[str, list[str]], str] = lambda prediction, answers: prediction,
    finite: list[bool] | None = None,
) -> list[dict[str, Any]]:
    """One row per question of weight > 0: sample_id, text, prediction, answers, type; question_id and question_type if
    given.

    Args:
        spelled_as: `GenerationOutput.spelled_as`, for generated predictions.
        finite: of each prediction, whether all scores that it was chosen by are finite numbers.
    """
    rows = []
    columns = zip(
        predictions,
        batch.text_owner.tolist(),
        batch.text_weight.tolist(),
        batch.targets["question"].tolist(),
        finite or [True] * len(predictions),
        strict=True,
    )
    for prediction, slot, weight, number, is_finite in columns:
        if weight > 0:
            asked = batch.records[slot]["questions"][number]
            answers = list(asked.get("answers", []))
            row = {"sample_id": batch.sample_id[slot], "text": asked["question"]}
            row |= {"prediction": spelled_as(prediction, answers), "answers": answers, "type": asked.get("type", "")}
            if not answers and asked.get("scores"):
                row["scores"] = asked["scores"]
            row |= {name: asked[name] for name in ("question_id", "question_type") if name in asked}
            rows.append(row if is_finite else row | NOT_FINITE)
    return rows


def accuracies(rows: list[dict[str, Any]], measure: Measure = "official") -> dict[str, float]:
    """`accuracy` and `accuracy_<type>`: official VQA accuracy where several annotators answered, else plain.

    Where some questions have more than one answer but fewer than ten, also `accuracy_any`: predictions that are one of
    the answers.
    """
    scores = _by_type("accuracy", ((r["type"], _judges(r), r["prediction"]) for r in rows), measure)
    if any(1 < len(row["answers"]) < ANNOTATORS for row in rows):
        scores["accuracy_any"] = statistics.mean(
            any_score(r["prediction"], r["answers"]) for r in rows if r["answers"]
        )
    return scores


def priors(
    train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]], measure: Measure = "official"
) -> dict[str, float]:
    """`majority`, always the most frequent training answer; `question_only`, the most frequent one to the same
    question; both overall and by question type."""
    overall: Counter[str] = Counter()
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for asked in _questions(train):
        if asked.get("answers"):
            answer = _most_common(Counter(asked["answers"]))
            overall[answer] += 1
            by_question[_key(asked["question"])][answer] += 1
    if not overall:
        return {}
    majority = _most_common(overall)
    prior = {question: _most_common(counts) for question, counts in by_question.items()}
    asked_in_test = list(_questions(test))

    def rated(name: str, answer: Callable[[dict[str, Any]], str]) -> dict[str, float]:
        return _by_type(name, ((a.get("type", ""), _judges(a), answer(a)) for a in asked_in_test), measure)

    return rated("majority", lambda _: majority) | rated(
        "question_only", lambda asked: prior.get(_key(asked["question"]), majority)
    )


def _question(asked: Any) -> Asked:
    if not isinstance(asked, dict) or not isinstance(asked.get("question"), str):
        raise BadSample("field", "a question has no text in `question`")
    answers = asked.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise BadSample("type", "`answers` is no list of strings")
    scores = asked.get("scores")
    if scores is not None and not (
        isinstance(scores, dict) and all(isinstance(s, float | int) and 0 <= s <= 1 for s in scores.values())
    ):
        raise BadSample("type", "`scores` is no object of numbers from 0 to 1")
    weight = asked.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, float | int) or not 0 <= weight < math.inf:
        raise BadSample("type", "`weight` of a question is no number from 0 on")
    return Asked(asked["question"], answers, scores, float(weight))


def _questions(records: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return (asked for record in records for asked in record.get("questions", []))


def _key(question: str) -> str:
    return " ".join(question.lower().split())


def _most_common(counts: Counter[str]) -> str:
    """Ties go to the first in alphabetical order, so that the order of the data does not matter."""
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _judges(asked: dict[str, Any]) -> list[str] | dict[str, float]:
    """References of a prediction: the annotators' answers, or the published scores where there are none."""
    return asked.get("answers") or asked.get("scores") or []


def _by_type(
    name: str, rated: Iterable[tuple[str, list[str] | dict[str, float], str]], measure: Measure
) -> dict[str, float]:
    """Mean score overall and by type, of (type, answers, prediction); questions without answers do not count."""
    scores: dict[str, list[float]] = defaultdict(list)
    rated = list(rated)
    keys = _type_keys({kind for kind, _, _ in rated if kind})
    for kind, answers, prediction in rated:
        if answers:
            value = answer_score(prediction, answers, measure)
            scores[name].append(value)
            if kind:
                scores[f"{name}_{keys[kind]}"].append(value)
    return {key: sum(values) / len(values) for key, values in sorted(scores.items())}


def _type_keys(kinds: Iterable[str]) -> dict[str, str]:
    """Key of each question type in the names of scores: its letters and digits, of any script. Types that differ have
    different keys: a number tells those apart that their letters do not."""
    keys: dict[str, str] = {}
    taken: Counter[str] = Counter()
    for kind in sorted(kinds):
        plain = re.sub(r"[\W_]+", "_", kind.casefold()).strip("_") or "type"
        taken[plain] += 1
        keys[kind] = plain if taken[plain] == 1 else f"{plain}_{taken[plain]}"
    return keys
