"""Task: answer questions about images by choosing from a closed list of answers."""

# T texts (questions) of the micro-batch, C answers

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.tasks.common import questions as _questions
from mmpeft_ds.tasks.vqa.options import Options


class Vqa:
    """Records hold `questions`: a list of {question, answers (1 or 10), question_id?, type?}."""

    Options = Options
    fields = ("questions",)
    couples_samples = False
    main_metric = "accuracy"
    better = "max"
    example_text = "what is in the picture?"

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
        texts, targets = [], []
        for number, text, answers in _questions.chosen(record, self.options.max_questions, generator):
            texts.append(text)
            scores = _questions.soft_scores(answers, self._index)
            targets.append({"question": number, "scores": {self._index[a]: score for a, score in scores.items()}})
        return texts, targets

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
        logits = at_least_float32(outputs.logits)
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
        return _questions.rows(batch, [self.labels[index] for index in best])

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy` and `accuracy_<type>`: official VQA accuracy where several annotators answered, else plain."""
        return _questions.accuracy(rows)

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`majority` and `question_only`: answers without a model, overall and by question type."""
        return _questions.priors(train, test)


ENTRY = Vqa
