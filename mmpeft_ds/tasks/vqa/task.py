"""Task: answer questions about images by choosing from a closed list of answers."""

# T texts (questions) of the micro-batch, C answers

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.tasks.common.losses import weighted_sum
from mmpeft_ds.tasks.common.questions import QuestionTask, answer_rows, drawn_questions, loss_weights, soft_scores
from mmpeft_ds.tasks.common.rows import check_different
from mmpeft_ds.tasks.vqa.options import Options


class Vqa(QuestionTask):
    """Records hold `questions`, see `common/questions.py`."""

    Options = Options

    def __init__(self, options: Options, labels: list[str] | None):
        super().__init__(options, labels)
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
        self.labels = list(labels[: options.num_answers or len(labels)])
        check_different(self.labels)
        self._index = {label: i for i, label in enumerate(self.labels)}

    def read_questions(
        self, record: dict[str, Any], most: int, generator: torch.Generator | None
    ) -> tuple[list[str], list[Any]]:
        """Questions of one sample and, for each, its number in the record, the score of every known answer, and the
        weight of its loss."""
        texts, targets = [], []
        for number, asked in drawn_questions(record, most, generator):
            texts.append(asked.question)
            scores = soft_scores(asked, self._index)
            of_index = {self._index[answer]: score for answer, score in scores.items()}
            targets.append({"question": number, "scores": of_index, "weight": asked.weight})
        return texts, targets

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """`question` and `weight` (T,); for ce `label` (T,), -1 = no known answer; for bce `score` (T, C)."""
        question = torch.tensor([t["question"] for t in targets], dtype=torch.int64)
        shared = {"question": question, "weight": loss_weights(targets)}
        if self.options.loss == "ce":
            label = torch.tensor([next(iter(t["scores"]), -1) for t in targets], dtype=torch.int64)
            return shared | {"label": label}
        score = torch.zeros(len(targets), len(self.labels))
        for row, target in enumerate(targets):
            for index, value in target["scores"].items():
                score[row, index] = value
        return shared | {"score": score}

    def dummy_target(self) -> Any:
        return {"question": -1, "scores": {0: 1.0}}

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
        return weighted_sum(each, self._weights(batch) * batch.targets["weight"])

    def predict(self, outputs: Any, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per question of weight > 0: sample_id, text, prediction, answers, type, question_id if given."""
        if not len(batch.text_owner):
            return []
        logits = outputs.logits[:, : len(self.labels)]
        answers = [self.labels[index] for index in logits.argmax(1).tolist()]
        return answer_rows(batch, answers, finite=logits.isfinite().all(1).tolist())


ENTRY = Vqa
