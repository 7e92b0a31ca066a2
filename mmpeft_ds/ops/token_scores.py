"""Losses of given tokens from the states before a frozen output layer, without the logits of all positions.

Logits of 4 x 2,048 positions over 152,064 tokens take 2.3 GiB in bfloat16, and 15 GiB with their float32 copy and
gradients. Here they exist for `CHUNK` labelled positions at a time. Only a loss of each token alone is read of them,
so its gradient towards the state is known in the forward pass already, and the backward pass needs neither logits nor
the weight of the output layer.
"""

# T texts, S positions, K last positions with labels, d width, V tokens of the vocabulary, N labelled positions

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpeft_ds.ops.precision import full_dtype

CHUNK = 512  # labelled positions whose logits exist together


@dataclass
class TokenScores:
    """Losses of the labelled tokens of T texts, and whether the model would have chosen them.

    Attributes:
        nll: (T, S) negative log-likelihood of each label, 0 without label.
        uniform: (T, S) mean negative log-likelihood over all tokens of the vocabulary, for label smoothing.
        right: (T, S) bool, whether the label is the most likely token.
    """

    nll: Tensor
    uniform: Tensor
    right: Tensor

    def losses(self, smoothing: float = 0.0) -> Tensor:
        """(T, S) cross-entropy with smoothed labels, as torch defines it."""
        return self.nll if not smoothing else (1 - smoothing) * self.nll + smoothing * self.uniform

    @classmethod
    def of(cls, outputs: Tensor) -> TokenScores:
        """Scores from the (T, S, 3) output of a layer within `scored`."""
        nll, uniform, right = outputs.unbind(-1)
        return cls(nll, uniform, right > 0.5)


def token_scores(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll, uniform and right, each (T, S), of the tokens `labels` under `states @ weight.T + bias`; 0 without label.

    Args:
        states: (T, S, d).
        weight: (V, d), bias: (V,); both frozen.
        labels: (T, S) int64, -100 at positions without a label.

    Returns:
        three tensors (T, S) in at least float32. nll and uniform have gradients towards `states`; right is 1 where the
        label is the most likely token, else 0.
    """
    places = (labels != -100).nonzero(as_tuple=True)
    scores = _Scores.apply(states[places], weight, bias, labels[places])
    return tuple(score.new_zeros(labels.shape).index_put(places, score) for score in scores)


class _Scores(torch.autograd.Function):
    """Scores nll, uniform and right, each (N,), from states (N, d) and labels (N,)."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_gradient = ctx.needs_input_grad[0]
        nll, uniform, right = states.new_empty(3, len(states), dtype=full_dtype(states.dtype))
        gradient = torch.empty_like(states) if with_gradient else None
        for start in range(0, len(states), CHUNK):
            part = slice(start, start + CHUNK)
            results = _chunk(states[part], weight, bias, labels[part], with_gradient)
            nll[part], uniform[part], right[part] = results[:3]
            if gradient is not None:
                gradient[part] = results[3]
        if gradient is not None:
            # Towards the logits, the gradient of `uniform` is p - 1 / V and that of `nll` is p - 1 at the label and p
            # elsewhere. The difference has no p in it, so it is made of rows of the weight alone.
            ctx.save_for_backward(gradient, weight[labels] - weight.mean(0))
        ctx.mark_non_differentiable(right)
        return nll, uniform, right

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient, difference = ctx.saved_tensors
        nll, uniform = (g[:, None] for g in output_gradients[:2])  # zeros where the loss does not use one
        full = (nll + uniform) * gradient + uniform * difference
        return full.to(gradient.dtype), None, None, None


def _chunk(
    states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """nll, uniform and right of some positions, and with `with_gradient` the gradient of nll towards their states."""
    logits = functional.linear(states, weight, bias)
    right = logits.argmax(1) == labels
    logs = torch.log_softmax(logits, 1, dtype=full_dtype(states.dtype))
    del logits
    nll, uniform = -logs.gather(1, labels[:, None])[:, 0], -logs.mean(1)
    if not with_gradient:
        return nll, uniform, right, None
    to_logits = logs.exp_()  # the gradient towards the logits: the probabilities, less 1 at the label
    to_logits.scatter_add_(1, labels[:, None], to_logits.new_full((len(to_logits), 1), -1.0))
    return nll, uniform, right, to_logits.to(weight.dtype) @ weight


def is_scorable(head: nn.Module | None) -> bool:
    """Whether `scored` can take the place of this output layer: a frozen linear layer without adapters.

    A forward of its own, such as accelerate gives a layer that it moves between devices, would be lost.
    """
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    return not any(p.requires_grad for p in head.parameters())


@contextlib.contextmanager
def scored(head: nn.Linear, labels_at: Callable[[int], Tensor]) -> Iterator[None]:
    """Within the block the output layer scores labels in place of computing logits.

    It stays a module that is called, and the loss still depends on what it returns, so that ZeRO-3 gathers its weight
    and notices its backward pass. What it returns is (T, S, 3) in the place of (T, S, V): nll, uniform, right.

    Args:
        head: the output layer, for which `is_scorable` holds.
        labels_at: gives, for the number of positions S, the (T, K) labels of the last K <= S of them.
    """

    def score(states: Tensor) -> Tensor:
        labels = labels_at(states.shape[1])
        labels = functional.pad(labels, (states.shape[1] - labels.shape[1], 0), value=-100)
        return torch.stack(token_scores(states, head.weight, head.bias, labels), -1)

    head.forward = score
    try:
        yield
    finally:
        del head.forward
