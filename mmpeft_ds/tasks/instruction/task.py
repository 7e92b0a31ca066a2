"""Task: conversations about a sample's images, as LLaVA's instruction data has them; loss on the assistant's turns.

In evaluation the last answer of a conversation is generated again and compared with the given one.
"""

# T texts (conversations) of the micro-batch, S positions, V vocabulary

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import MARKS, PackedBatch, Prompted
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.tasks.base import TaskBase
from mmpeft_ds.tasks.common.losses import weighted_sum
from mmpeft_ds.tasks.instruction.options import Options

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Instruction(TaskBase):
    """Records hold `conversations`: a list of {from: human, gpt or system, value}; `<image>` marks a place."""

    Options = Options
    unit = "conversations"
    prompt_kind, target_kind = "conversation", "answer"
    no_weight = "no conversation has a word of the assistant"
    main_metric = "perplexity"
    better = "min"
    example_text = "Describe the picture."

    def __init__(self, options: Options, labels: list[str] | None):
        super().__init__(options, labels)
        if options.loss not in ("token", "conversation"):
            raise BadInput(f"task.loss: {options.loss!r}. Use token or conversation.")
        if options.num_beams < 1:
            raise BadInput(f"task.num_beams: {options.num_beams}. Use 1 or more.")
        if options.max_new_tokens < 0:
            raise BadInput(f"task.max_new_tokens: {options.max_new_tokens}. Use 1 or more, or 0 to generate nothing.")
        if options.max_new_tokens:
            self.generation = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Prompted], list[Any]]:
        """The conversation: its last question and answer, and all turns before."""
        turns = _turns(record.get("conversations"))
        return [Prompted(turns[-2][1], turns[-1][1], tuple(turns[:-2]))], [{}]

    def prompted(self, text: str) -> Prompted:
        """A question given in prediction, as the model reads it."""
        return Prompted(text)

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """A record without conversations, and a target for each text."""
        return {"conversations": []}, [{} for _ in texts]

    def weight(self, batch: PackedBatch) -> float:
        """Tokens of the assistant, or conversations, that enter the loss."""
        if not len(batch.text_owner):
            return 0.0
        tokens = (batch.texts["labels"] != -100).sum(1)
        counted = tokens if self.options.loss == "token" else tokens > 0
        return float((batch.text_weight.double() * counted).sum())

    def loss(self, outputs: GenerationOutput, batch: PackedBatch) -> Tensor:
        """Sum over conversations of weight times the sum, or the mean, of the cross-entropy over their tokens."""
        each = outputs.losses()
        if self.options.loss == "conversation":
            each = each / outputs.tokens().clamp(min=1)
        return weighted_sum(each, batch.text_weight)

    def predict(self, outputs: GenerationOutput, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per conversation of weight > 0: sample_id, text (the last question), prediction, the given answer,
        and of all turns of the assistant `nll` (sum), `tokens` and `tokens_right` (most likely = given)."""
        if not len(batch.text_owner):
            return []
        nll, tokens = outputs.token_losses()
        right = outputs.tokens_right()
        generated = outputs.generated or [""] * len(batch.raw_texts)
        rows = []
        for i, (text, slot) in enumerate(zip(batch.raw_texts, batch.text_owner.tolist(), strict=True)):
            if batch.weight[slot] > 0:
                row = {"sample_id": batch.sample_id[slot], "text": text.prompt}
                row |= {"prediction": outputs.spelled_as(generated[i], [text.target])}
                row |= {"answer": text.target, "nll": float(nll[i])}
                rows.append(row | {"tokens": int(tokens[i]), "tokens_right": int(right[i])})
        return rows

    def scored(self, rows: list[dict[str, Any]]) -> int:
        """Conversations in which the assistant's words were read at all."""
        return sum(row["tokens"] > 0 for row in rows)

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`perplexity` and `token_accuracy` over all tokens of the assistant; `exact_match` of the last answers, if
        they were generated (case and spaces do not count)."""
        tokens = sum(r["tokens"] for r in rows)
        scores = {}
        if tokens:
            scores["perplexity"] = math.exp(min(sum(r["nll"] for r in rows) / tokens, 700.0))
            scores["token_accuracy"] = sum(r["tokens_right"] for r in rows) / tokens
        known = [r for r in rows if r["answer"]]
        if self.generation is not None and known:
            scores["exact_match"] = sum(_plain(r["prediction"]) == _plain(r["answer"]) for r in known) / len(known)
        return scores

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`majority_exact_match`: of always giving the most frequent last answer of the training conversations."""
        counts = Counter(_plain(answer) for answer in _last_answers(train))
        asked = [_plain(answer) for answer in _last_answers(test)]
        if not counts or not asked:
            return {}
        majority = min(counts, key=lambda answer: (-counts[answer], answer))
        return {"majority_exact_match": asked.count(majority) / len(asked)}


ENTRY = Instruction


def _turns(conversation: Any) -> list[tuple[str, str]]:
    """(role, text) of a conversation that ends with an answer. Raises BadSample.

    As LLaVA reads its data: a turn of the assistant before the first question, and a question without answer at the
    end, are left out.
    """
    if not isinstance(conversation, list):
        raise BadSample("field", "`conversations` is no list")
    system, turns = [], []
    for turn in conversation:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadSample("type", "a turn needs `from` (human, gpt or system) and a text in `value`")
        text = turn["value"].strip()
        if role == "assistant" and (mark := MARKS.search(text)):
            raise BadSample("turns", f"a turn of the assistant holds {mark[0]}, which stands for what it reads")
        if role == "system":
            if turns:
                raise BadSample("turns", "a system turn stands after others")
            system.append(text)
        elif turns or role == "user":
            turns.append((role, text))
    if turns and turns[-1][0] == "user":
        turns.pop()
    expected = ("user", "assistant") * (len(turns) // 2)
    if not turns or tuple(role for role, _ in turns) != expected:
        raise BadSample("turns", "questions and answers do not alternate, or there are none")
    if not all(text for role, text in turns if role == "assistant"):
        raise BadSample("turns", "an answer is empty")
    return [*([("system", "\n".join(system))] if system else []), *turns]


def _last_answers(records: Iterable[dict[str, Any]]) -> Iterable[str]:
    for record in records:
        try:
            yield _turns(record.get("conversations"))[-1][1]
        except BadSample:
            continue


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
