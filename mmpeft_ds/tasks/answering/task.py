"""Task: questions about a sample's images, answered in words by a generative model; official VQA accuracy.

Several tasks of one model differ by their prompts: with "vqa: ", "gpa: " and "nlvr: " as in VL-Adapter
(arXiv 2112.06825; specs/routing.md 2.3) these are VQAv2, GQA and, with `choices: ["true", "false"]`, NLVR2.
"""

# T texts (questions) of the micro-batch, S target tokens

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch, Prompted
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.errors import BadInput
from mmpeft_ds.tasks.answering.options import Options
from mmpeft_ds.tasks.common.losses import weighted_sum
from mmpeft_ds.tasks.common.questions import QuestionTask, answer_rows, drawn_questions, loss_weights, soft_scores
from mmpeft_ds.tasks.common.rows import check_different


class Answering(QuestionTask):
    """Records hold `questions`, see `common/questions.py`."""

    Options = Options

    def __init__(self, options: Options, labels: list[str] | None):
        super().__init__(options, labels)
        for key in ("num_beams", "max_new_tokens"):
            if getattr(options, key) < 1:
                raise BadInput(f"task.{key}: {getattr(options, key)}. Use 1 or more.")
        if len(options.choices) == 1 or len(set(options.choices)) < len(options.choices) or "" in options.choices:
            raise BadInput(f"task.choices: {options.choices}. Name at least two different answers, or none for any.")
        if options.listed_only and not labels:
            raise BadInput(
                "task.listed_only: true, but the data has no label list. Prepare it with one, or say false."
            )
        known = options.choices or (labels if options.listed_only else None)
        check_different(known or [])
        self._known = None if known is None else dict.fromkeys(known)
        self.generation = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
        if options.choices:
            self.generation["choices"] = options.choices

    def read_questions(
        self, record: dict[str, Any], most: int, generator: torch.Generator | None
    ) -> tuple[list[Prompted], list[Any]]:
        """Prompt and target of each question, its number in the record, the score of the target, and the weight of its
        loss."""
        texts, targets = [], []
        for number, asked in drawn_questions(record, most, generator):
            answer, score = self._target(soft_scores(asked, self._known), generator)
            texts.append(self.prompted(asked.question, answer))
            targets.append({"question": number, "score": score, "weight": asked.weight})
        return texts, targets

    def every_text(self, record: dict[str, Any]) -> list[Prompted]:
        """Every question with each answer that training may take, or alone where none counts."""
        texts = []
        for _, asked in drawn_questions(record, 0, None):
            answers = [answer for answer in soft_scores(asked, self._known) if answer.strip()]
            answers = answers[:1] if self.options.target == "best" else answers
            texts += [self.prompted(asked.question, answer) for answer in answers or [""]]
        return texts

    def prompted(self, question: str, answer: str = "") -> Prompted:
        """A question as the model reads it."""
        return Prompted(self.options.prompt + question, answer)

    def _target(self, scores: dict[str, float], generator: torch.Generator | None) -> tuple[str, float]:
        """The target answer and its score; empty and 0 where nobody gave one that counts. Without a generator nothing
        is drawn: the most frequent one."""
        scores = {answer: score for answer, score in scores.items() if answer.strip()}
        if not scores:
            return "", 0.0
        answers = list(scores)
        if generator is None or self.options.target == "best":
            return answers[0], scores[answers[0]]
        weights = torch.tensor(list(scores.values()), dtype=torch.float64)
        drawn = answers[int(torch.multinomial(weights, 1, generator=generator))]
        return drawn, scores[drawn]

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """`question`, `weight` and `score` (T,), 0 = no known answer."""
        return {
            "weight": loss_weights(targets),
            "question": torch.tensor([t["question"] for t in targets], dtype=torch.int64),
            "score": torch.tensor([t["score"] for t in targets], dtype=torch.float32),
        }

    def dummy_target(self) -> Any:
        return {"question": -1, "score": 1.0}

    def weight(self, batch: PackedBatch) -> float:
        """Questions that enter the loss: those with a known answer."""
        return float(self._weights(batch).double().sum()) if len(batch.text_owner) else 0.0

    def _weights(self, batch: PackedBatch) -> Tensor:
        return batch.text_weight * (batch.targets["score"] > 0)

    def loss(self, outputs: GenerationOutput, batch: PackedBatch) -> Tensor:
        """Sum over questions of weight times the mean cross-entropy of the target's tokens (times its score)."""
        total, count = outputs.token_losses()
        each = total / count.clamp(min=1)
        if self.options.score_weight:
            each = each * batch.targets["score"].to(each.dtype)
        return weighted_sum(each, self._weights(batch) * batch.targets["weight"])

    def predict(self, outputs: GenerationOutput, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per question of weight > 0: sample_id, text, prediction, answers, type, question_id if given."""
        return answer_rows(batch, outputs.generated, outputs.spelled_as) if len(batch.text_owner) else []


ENTRY = Answering
