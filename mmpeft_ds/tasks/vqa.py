"""Task: answer questions about images by choosing from a closed list of answers."""

# T texts (questions) of the micro-batch, C answers

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.metrics.vqa import answer_score, normalize_answer, soft_score


@dataclass
class Options:
    """Keys of a source's `task` section.

    Attributes:
        loss: `bce`, binary cross-entropy against soft targets, the mean over the answers; or `ce`, cross-entropy on
            the answer that most annotators gave.
        num_answers: use the first n answers of the label list, 0 = all.
        max_questions: questions of a sample in one visit, drawn anew every epoch, 0 = all.
    """

    loss: Literal["bce", "ce"] = "bce"
    num_answers: int = 0
    max_questions: int = 0


class Vqa:
    """Records hold `questions`: a list of {question, answers (1 or 10), question_id?, type?}."""

    Options = Options
    fields = ("questions",)
    couples_samples = False
    main_metric = "accuracy"
    better = "max"

    def __init__(self, options: Options, labels: list[str] | None):
        if not labels:
            raise BadInput(
                "task vqa: the data set has no label list. Prepare it with one: it names the answers to choose from."
            )
        if options.loss not in ("bce", "ce"):
            raise BadInput(f"task.loss: {options.loss!r}. Use bce or ce.")
        if not 0 <= options.num_answers <= len(labels):
            raise BadInput(
                f"task.num_answers: {options.num_answers}, but the label list has {len(labels)}. Use 0 for all."
            )
        if options.max_questions < 0:
            raise BadInput(f"task.max_questions: {options.max_questions}. Use 0 for all or a positive number.")
        self.options = options
        self.labels = list(labels[: options.num_answers or len(labels)])
        self._index = {label: i for i, label in enumerate(self.labels)}

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[str], list[Any]]:
        """Questions of one sample and, for each, its number in the record and the score of every known answer."""
        questions = record.get("questions")
        if not isinstance(questions, list):
            raise BadSample("field", "`questions` is no list")
        chosen = range(len(questions))
        if 0 < self.options.max_questions < len(questions):
            drawn = torch.randperm(len(questions), generator=generator)[: self.options.max_questions]
            chosen = sorted(drawn.tolist())
        texts, targets = [], []
        for number in chosen:
            text, answers = _question(questions[number])
            texts.append(text)
            targets.append({"question": number, "scores": self._scores(answers)})
        return texts, targets

    def _scores(self, answers: list[str]) -> dict[int, float]:
        """Class -> soft score, the most frequent answer first; answers outside the list are left out."""
        votes: Counter[int] = Counter()
        for answer in answers:
            found = self._index.get(answer)
            if found is None:
                found = self._index.get(normalize_answer(answer))
            if found is not None:
                votes[found] += 1
        # Counter keeps the order of first occurrence among equals, which is the order of the record.
        return {index: soft_score(count, len(answers)) for index, count in votes.most_common()}

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """`question` (T,); for ce `label` (T,), -1 = no known answer; for bce `score` (T, C)."""
        question = torch.tensor([t["question"] for t in targets], dtype=torch.int64)
        if self.options.loss == "ce":
            label = torch.tensor([next(iter(t["scores"]), -1) for t in targets], dtype=torch.int64)
            return {"question": question, "label": label}
        score = torch.zeros(len(targets), len(self.labels))
        for row, target in enumerate(targets):
            for index, value in target["scores"].items():
                score[row, index] = value
        return {"question": question, "score": score}

    def dummy_target(self) -> Any:
        return {"question": -1, "scores": {0: 1.0}}

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """A record with these questions, none of them answered, and their targets."""
        questions = [{"question": text, "answers": []} for text in texts]
        return {"questions": questions}, [{**self.dummy_target(), "question": i} for i in range(len(texts))]

    def weight(self, batch: PackedBatch) -> float:
        """Questions that enter the loss."""
        return float(self._weights(batch).double().sum()) if len(batch.text_owner) else 0.0

    def _weights(self, batch: PackedBatch) -> Tensor:
        weights = batch.text_weight
        # Cross-entropy has no target for a question whose answers are all outside the list.
        return weights * (batch.targets["label"] >= 0) if self.options.loss == "ce" else weights

    def loss(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Sum over questions of weight times cross-entropy, or times the mean over answers of the binary one."""
        logits = _at_least_float32(outputs.logits)
        if not len(batch.text_owner):
            return logits.sum() * 0
        if self.options.loss == "ce":
            # -1 must not index the logits; its weight is 0
            each = cross_entropy(logits[:, : len(self.labels)], batch.targets["label"].clamp(min=0), reduction="none")
        else:
            target = batch.targets["score"].to(logits.dtype)
            each = binary_cross_entropy_with_logits(logits[:, : len(self.labels)], target, reduction="none").mean(1)
        # where, not a product: a weight-0 question must not spread a non-finite loss
        weights = self._weights(batch).to(each.dtype)
        return torch.where(weights > 0, each * weights, torch.zeros_like(each)).sum()

    def predict(self, outputs: Any, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per question of weight > 0: sample_id, text, prediction, answers, type, question_id if given."""
        if not len(batch.text_owner):
            return []
        best = outputs.logits[:, : len(self.labels)].argmax(1).tolist()
        rows = []
        columns = zip(
            best,
            batch.text_owner.tolist(),
            batch.text_weight.tolist(),
            batch.targets["question"].tolist(),
            batch.raw_texts,
            strict=True,
        )
        for index, slot, weight, number, text in columns:
            if weight > 0:
                asked = batch.records[slot]["questions"][number]
                row = {"sample_id": batch.sample_id[slot], "text": text, "prediction": self.labels[index]}
                row |= {"answers": list(asked.get("answers", [])), "type": asked.get("type", "")}
                if "question_id" in asked:
                    row["question_id"] = asked["question_id"]
                rows.append(row)
        return rows

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy` and `accuracy_<type>`: official VQA accuracy where several annotators answered, else plain."""
        return _by_type("accuracy", ((r["type"], r["answers"], r["prediction"]) for r in rows))

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
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
            return _by_type(name, ((a.get("type", ""), a.get("answers", []), answer(a)) for a in asked_in_test))

        return rated("majority", lambda _: majority) | rated(
            "question_only", lambda asked: prior.get(_key(asked["question"]), majority)
        )


ENTRY = Vqa


def _question(asked: Any) -> tuple[str, list[str]]:
    if not isinstance(asked, dict) or not isinstance(asked.get("question"), str):
        raise BadSample("field", "a question has no text in `question`")
    answers = asked.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise BadSample("type", "`answers` is no list of strings")
    return asked["question"], answers


def _questions(records: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return (asked for record in records for asked in record.get("questions", []))


def _key(question: str) -> str:
    return " ".join(question.lower().split())


def _most_common(counts: Counter[str]) -> str:
    """Ties go to the first in alphabetical order, so that the order of the data does not matter."""
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _by_type(name: str, rated: Iterable[tuple[str, list[str], str]]) -> dict[str, float]:
    """Mean score overall and by type, of (type, answers, prediction); questions without answers do not count."""
    scores: dict[str, list[float]] = defaultdict(list)
    for kind, answers, prediction in rated:
        if answers:
            value = answer_score(prediction, answers)
            scores[name].append(value)
            if kind:
                scores[f"{name}_{re.sub(r'[^0-9a-z]+', '_', kind.lower()).strip('_')}"].append(value)
    return {key: sum(values) / len(values) for key, values in sorted(scores.items())}


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
