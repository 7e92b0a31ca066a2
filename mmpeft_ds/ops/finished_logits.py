"""What some language models make of the logits of their output layer: a factor, a cap, fewer tokens."""

# n positions, V tokens of the vocabulary, T texts, S positions

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Finish:
    """`cap * tanh(scale * logits / cap)` of the first `tokens` of the vocabulary.

    Attributes:
        scale: factor of the logits.
        cap: bound of what becomes of them; None: none.
        tokens: number of tokens that exist; None: all of the output layer.
    """

    scale: float = 1.0
    cap: float | None = None
    tokens: int | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Of logits (..., V)."""
        logits = logits[..., : self.tokens] * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def apply_(self, logits: Tensor) -> Tensor | None:
        """In place, without `tokens`; returns the derivatives (n, V) of the cap, without the factor; None if uncapped.

        Args:
            logits: (n, V).
        """
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.cap is None:
            return None
        share = logits.div_(self.cap).tanh_()
        slope = (share * share).neg_().add_(1)
        logits.mul_(self.cap)
        return slope


PLAIN = Finish()


class Untouched(Tensor):
    """Scores of labels (T, S, 3) in the place of logits, which the model hands on without scaling or capping them."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What would finish logits returns its argument."""
        if function in _FINISHING:
            return next(a for a in args if isinstance(a, cls))
        return super().__torch_function__(function, types, args, kwargs or {})


# A Python operator comes as the method: `logits / 30` as `Tensor.div`.
_FINISHING = frozenset(
    (Tensor.mul, torch.mul, Tensor.div, torch.div, Tensor.tanh, torch.tanh, Tensor.float, Tensor.to)
)


def touchable(scores: Tensor) -> Tensor:
    """`scores` as an ordinary tensor."""
    if not isinstance(scores, Untouched):
        return scores
    with torch._C.DisableTorchFunctionSubclass():
        return scores.as_subclass(Tensor)
