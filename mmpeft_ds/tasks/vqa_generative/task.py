"""Task: questions answered by a generative model, trained on all answers that people gave, weighted by how many did.

Evaluation picks from the list of answers by their likelihood, or lets the model generate freely. With
`answer_weight: 0.05` and `evaluate: write` this is open-ended video question answering as Aurora has it.

Source: ALBEF, arXiv 2107.07651; p-Adapter, AAAI 2024; Aurora, arXiv 2305.08381.
"""

# T texts (a question with one of its answers) of the micro-batch, S target tokens

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch, Prompted
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.errors import BadInput
from mmpeft_ds.tasks.common.losses import weighted_sum
from mmpeft_ds.tasks.common.questions import Asked, QuestionTask, answer_rows, drawn_questions, loss_weights
from mmpeft_ds.tasks.common.rows import check_different
from mmpeft_ds.tasks.vqa_generative.options import Options

_REMOVED = re.compile(r"[.!\"()*#:;~]")


class VqaGenerative(QuestionTask):
    """Records hold `questions`: a list of {question, answers, question_id?, type?}."""

    Options = Options

    def __init__(self, options: Options, labels: list[str] | None):
        super().__init__(options, labels)
        for key in ("num_beams", "max_new_tokens", "k"):
            if getattr(options, key) < 1:
                raise BadInput(f"task.{key}: {getattr(options, key)}. Use 1 or more.")
        if options.answer_weight < 0:
            raise BadInput(f"task.answer_weight: {options.answer_weight}. Use 0 or more.")
        if not 0 <= options.smoothing < 1:
            raise BadInput(f"task.smoothing: {options.smoothing}. Use a number in [0, 1).")
        if options.prompt.count("{}") != 1:
            raise BadInput(f"task.prompt: {options.prompt!r} must have {{}} once, for the question.")
        if options.evaluate not in ("rank", "write"):
            raise BadInput(f"task.evaluate: {options.evaluate!r}. Use rank or write.")
        listed = options.choices or list(labels or [])
        if not listed and (options.evaluate == "rank" or options.listed_only):
            raise BadInput(
                "task: no answers to choose from. Name choices, prepare the data with a label list, or say evaluate: "
                "write and listed_only: false."
            )
        check_different(listed)
        self._listed = dict.fromkeys(listed)
        if options.evaluate == "rank":
            self.ranking = {"answers": listed, "k": options.k, "smoothing": options.smoothing}
        else:
            self.generation = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}

    def read_questions(
        self, record: dict[str, Any], most: int, generator: torch.Generator | None
    ) -> tuple[list[Prompted], list[Any]]:
        """Every question once for each of its distinct answers, the most frequent first; for training."""
        texts, targets = [], []
        for number, asked in drawn_questions(record, most, generator):
            for place, (answer, weight) in enumerate(self._weighted(asked).items()):
                texts.append(self.prompted(asked.question, answer))
                targets.append({"question": number, "weight": weight, "first": float(place == 0)})
        return texts, targets

    def read_all(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Prompted], list[Any]]:
        """Every question once, for evaluation, with its most frequent answer if it has one that counts."""
        texts, targets = [], []
        for number, asked in drawn_questions(record, 0, None):
            best = next(iter(self._weighted(asked)), "")
            texts.append(self.prompted(asked.question, best))
            targets.append({"question": number, "weight": bool(best) * asked.weight, "first": float(bool(best))})
        return texts, targets

    def every_text(self, record: dict[str, Any]) -> list[Prompted]:
        """Every question with each of its answers, or alone where none counts."""
        read = self.read_questions(record, 0, None)[0]
        answered = {text.prompt for text in read}
        return [*read, *(text for text in self.read_all(record, None)[0] if text.prompt not in answered)]

    def prompted(self, question: str, answer: str = "") -> Prompted:
        """A question as the model reads it."""
        if self.options.clean:
            question = " ".join(_REMOVED.sub("", question.lower()).split())
        return Prompted(self.options.prompt.replace("{}", question), answer)

    def _weighted(self, asked: Asked) -> dict[str, float]:
        """Answer -> weight of its loss, that of the question included; the most frequent first."""
        votes = Counter(a for a in asked.answers if a.strip() and (not self.options.listed_only or a in self._listed))
        given = self.options.answer_weight
        return {a: (given or count / len(asked.answers)) * asked.weight for a, count in votes.most_common()}

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """`question`, `weight` and `first` (T,): number in the record, weight of the answer, 1 for one answer each."""
        return {
            "question": torch.tensor([t["question"] for t in targets], dtype=torch.int64),
            "weight": loss_weights(targets),
            "first": torch.tensor([t["first"] for t in targets], dtype=torch.float32),
        }

    def dummy_target(self) -> Any:
        return {"question": -1, "weight": 1.0, "first": 1.0}

    def weight(self, batch: PackedBatch) -> float:
        """Questions that enter the loss, each once, however many answers it has."""
        return float((batch.text_weight * batch.targets["first"]).double().sum()) if len(batch.text_owner) else 0.0

    def loss(self, outputs: GenerationOutput, batch: PackedBatch) -> Tensor:
        """Sum over answers of weight times the negative log-likelihood, summed over tokens."""
        total, _ = outputs.token_losses(self.options.smoothing)
        return weighted_sum(total, batch.text_weight * batch.targets["weight"])

    def predict(self, outputs: GenerationOutput, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per question of weight > 0: sample_id, text, prediction, answers, type, question_id if given."""
        return answer_rows(batch, outputs.generated, outputs.spelled_as) if len(batch.text_owner) else []


ENTRY = VqaGenerative
