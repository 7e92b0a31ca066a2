"""Task: questions answered by a model that writes, trained on every answer that people gave, weighted by how many did.

Evaluation picks from the list of answers by their likelihood, or lets the model write. With `answer_weight: 0.05` and
`evaluate: write` this is open-ended video question answering as Aurora has it.

Source: ALBEF, arXiv 2107.07651; p-Adapter, AAAI 2024; Aurora, arXiv 2305.08381.
"""

# T texts (a question with one of its answers) of the micro-batch, S target tokens

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import GenerationOutput, PackedBatch, Prompted
from mmpeft_ds.errors import BadInput
from mmpeft_ds.tasks.common import questions as _questions
from mmpeft_ds.tasks.vqa_generative.options import Options

_REMOVED = re.compile(r"[.!\"()*#:;~]")


class VqaGenerative:
    """Records hold `questions`: a list of {question, answers, question_id?, type?}."""

    Options = Options
    fields = ("questions",)
    couples_samples = False
    main_metric = "accuracy"
    better = "max"
    example_text = "what is in the picture?"

    def __init__(self, options: Options, labels: list[str] | None):
        for key in ("num_beams", "max_new_tokens", "k"):
            if getattr(options, key) < 1:
                raise BadInput(f"task.{key}: {getattr(options, key)}. Use 1 or more.")
        if options.max_questions < 0 or options.answer_weight < 0:
            raise BadInput("task.max_questions, task.answer_weight: negative. Use 0 or more.")
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
        self.options = options
        self._listed = dict.fromkeys(listed)
        self.ranking = self.generation = None
        if options.evaluate == "rank":
            self.ranking = {"answers": listed, "k": options.k, "smoothing": options.smoothing}
        else:
            self.generation = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Prompted], list[Any]]:
        """Every question once for each of its distinct answers, the most frequent first."""
        texts, targets = [], []
        for number, question, answers in _questions.chosen(record, self.options.max_questions, generator):
            for place, (answer, weight) in enumerate(self._weighted(answers).items()):
                texts.append(self.prompted(question, answer))
                targets.append({"question": number, "weight": weight, "first": float(place == 0)})
        return texts, targets

    def read_all(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Prompted], list[Any]]:
        """Every question once, for evaluation, with its most frequent answer if it has one that counts."""
        texts, targets = [], []
        for number, question, answers in _questions.chosen(record, 0, generator):
            best = next(iter(self._weighted(answers)), "")
            texts.append(self.prompted(question, best))
            targets.append({"question": number, "weight": float(bool(best)), "first": float(bool(best))})
        return texts, targets

    def prompted(self, question: str, answer: str = "") -> Prompted:
        """A question as the model reads it."""
        if self.options.clean:
            question = " ".join(_REMOVED.sub("", question.lower()).split())
        return Prompted(self.options.prompt.replace("{}", question), answer)

    def _weighted(self, answers: list[str]) -> dict[str, float]:
        votes = Counter(a for a in answers if a and (not self.options.listed_only or a in self._listed))
        given = self.options.answer_weight
        return {answer: given or count / len(answers) for answer, count in votes.most_common()}

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """`question`, `weight` and `first` (T,): number in the record, weight of the answer, 1 once a question."""
        return {
            "question": torch.tensor([t["question"] for t in targets], dtype=torch.int64),
            "weight": torch.tensor([t["weight"] for t in targets], dtype=torch.float32),
            "first": torch.tensor([t["first"] for t in targets], dtype=torch.float32),
        }

    def dummy_target(self) -> Any:
        return {"question": -1, "weight": 1.0, "first": 1.0}

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """A record with these questions, none of them answered, and their targets."""
        questions = [{"question": text, "answers": []} for text in texts]
        return {"questions": questions}, [{"question": i, "weight": 0.0, "first": 0.0} for i in range(len(texts))]

    def weight(self, batch: PackedBatch) -> float:
        """Questions that enter the loss, each once, however many answers it has."""
        return float((batch.text_weight * batch.targets["first"]).double().sum()) if len(batch.text_owner) else 0.0

    def loss(self, outputs: GenerationOutput, batch: PackedBatch) -> Tensor:
        """Sum over answers of weight times the negative log-likelihood, summed over tokens."""
        total, _ = outputs.token_losses(self.options.smoothing)
        weights = (batch.text_weight * batch.targets["weight"]).to(total.dtype)
        # where, not a product: a weight-0 text must not spread a non-finite loss
        return torch.where(weights > 0, total * weights, torch.zeros_like(total)).sum()

    def predict(self, outputs: GenerationOutput, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per question of weight > 0: sample_id, text, prediction, answers, type, question_id if given."""
        return _questions.rows(batch, outputs.generated) if len(batch.text_owner) else []

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy` and `accuracy_<type>`: official VQA accuracy where several annotators answered, else plain."""
        return _questions.accuracy(rows)

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`majority` and `question_only`: answers without a model, overall and by question type."""
        return _questions.priors(train, test)


ENTRY = VqaGenerative
