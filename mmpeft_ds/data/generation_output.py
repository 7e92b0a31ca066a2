"""What a generative model gives for the texts of a batch, as tasks read it."""

# T texts, S positions of a text, V words of the vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from mmpeft_ds.ops.token_scores import TokenScores


@dataclass
class GenerationOutput:
    """Outputs of a generative model for the T texts of a batch; made by `BackboneBase.read`, read by tasks.

    Attributes:
        logits: (T, S, V); position s predicts `labels[:, s]`, with the shift of the model family undone. None where
            `scores` stand in their place.
        labels: (T, S) int64 token ids, -100 at positions without loss.
        generated: T strings, in the evaluation of a task with `generation`.
        as_generated: `BackboneBase.as_generated`, beside `generated`.
        scores: of the labels, where `engine.assembly.forward` was asked for them.
        tie: zero that depends on what no text reads, so that all ranks reach the same towers in backward.
        text_of: (1, S) the text of each position, where all T texts stand in one row; the first dimension of logits,
            labels and scores is then 1. None: each has a row of its own.
        texts: T, with `text_of`.
        lengths, positions: (T,) tokens of each text as the model read it, image tokens included, and the number of
            positions that it computed for them, padding included; None and 0 where the collated texts say it.
    """

    logits: Tensor | None
    labels: Tensor
    generated: list[str] | None = None
    as_generated: Callable[[str], str | None] | None = None
    scores: TokenScores | None = None
    tie: Tensor | None = None
    text_of: Tensor | None = None
    texts: int = 0
    lengths: Tensor | None = None
    positions: int = 0

    def token_losses(self, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(T,) `losses`, and (T,) `tokens`."""
        return self.losses(smoothing), self.tokens()

    def losses(self, smoothing: float = 0.0) -> Tensor:
        """(T,) negative log-likelihood, summed over the tokens with loss, at least float32."""
        if self.scores is not None:
            losses = self.scores.losses(smoothing)
        else:
            logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
            losses = cross_entropy(logits.transpose(1, 2), self.labels, reduction="none", label_smoothing=smoothing)
        total = self._of_texts(losses)
        return total if self.tie is None else total + self.tie

    def tokens(self) -> Tensor:
        """(T,) number of tokens with loss."""
        return self._of_texts((self.labels != -100).long())

    def tokens_right(self) -> Tensor:
        """(T,) number of labels that are the most likely token."""
        right = self.logits.argmax(-1) == self.labels if self.scores is None else self.scores.right
        return self._of_texts((right & (self.labels != -100)).long())

    def _of_texts(self, values: Tensor) -> Tensor:
        """(T,) sums of what stands at the positions of each text."""
        if self.text_of is None:
            return values.sum(1)
        return values.new_zeros(self.texts).index_add(0, self.text_of[0], values[0])

    def spelled_as(self, generated: str, references: Sequence[str]) -> str:
        """A generated text as the references spell it, where it is one of them to the model's tokenizer.

        Tokenizers drop spaces, case or accents, so that a model cannot generate some references exactly. Texts
        that are the same to the tokenizer become the same here, and no others.

        Returns:
            the most frequent of the references that it equals; the text itself if it equals none.
        """
        if self.as_generated is None:
            return generated
        equal = [text for text in references if self.as_generated(text) == generated]
        return max(equal, key=equal.count) if equal else generated
