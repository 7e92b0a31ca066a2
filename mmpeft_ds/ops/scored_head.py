"""An output layer that scores labels in place of computing logits, while it stays a module that is called."""

# T texts, S positions, K last positions with labels, V tokens of the vocabulary

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpeft_ds.host_copies import both
from mmpeft_ds.ops.finished_logits import PLAIN, Finish, Untouched
from mmpeft_ds.ops.token_scores import KnownScores, known_scores, scores_of_layer, token_scores


def is_scorable(head: nn.Module | None) -> bool:
    """Whether `scored` can take the place of this output layer by its weight: a linear layer, frozen or trained,
    without adapters.

    A forward of its own, such as accelerate gives a layer that it moves between devices, would be lost.
    """
    return type(head) is nn.Linear and "forward" not in vars(head)


def biased_logits(head: nn.Module, states: Tensor, bias: Tensor) -> Tensor:
    """(T, S, V) logits `head(states)` plus `bias`, (V,) or (1, V), for models whose checkpoints have a bias that
    belongs to no layer. Within `scored` the bias enters the scores."""
    # peft may have wrapped the layer that computes
    scorers = [f for m in head.modules() if isinstance(f := vars(m).get("forward"), _Scorer)]
    if not scorers:
        return head(states) + bias
    scorers[0].added = bias.flatten()
    return head(states)


def aligned(labels: Tensor, positions: int) -> Tensor:
    """(T, S) of the (T, K) labels of the last K of S positions: nothing is asked of those before."""
    before = positions - labels.shape[1]
    return both(lambda known: functional.pad(known, (before, 0), value=-100), labels)


@contextlib.contextmanager
def scored(head: nn.Module, labels_at: Callable[[int], Tensor], finish: Finish = PLAIN) -> Iterator[None]:
    """Context in which the output layer returns (T, S, 3) in place of (T, S, V): nll, uniform, right.

    It stays a module that is called, so that ZeRO-3 gathers its weight. A frozen one is called with detached states,
    and what it returns is joined to them after all hooks of others: ZeRO-3 would gather the weight again before the
    backward pass of a layer that returns something with a gradient, and this one has no more use for it.

    Args:
        head: the output layer, for which `is_scorable` holds; or one with adapters that treat each position by
            itself. That one is run in as many parts as there are labels for, so ZeRO-3 has to gather it as a whole.
        labels_at: gives, for the number of positions S, the (T, K) labels of the last K <= S of them.
        finish: what the model makes of the logits; it then hands on the scores `Untouched`.
    """
    scorer = _Scorer(head, labels_at, finish)
    handles = []
    if type(head) is nn.Linear and not (
        head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    ):
        handles = [
            head.register_forward_pre_hook(scorer.detach, prepend=True),
            head.register_forward_hook(scorer.attach),
        ]
    if finish != PLAIN:
        handles.append(head.register_forward_hook(lambda head, args, scores: scores.as_subclass(Untouched)))
    vars(head)["forward"] = scorer  # `nn.Module` would look for a parameter of this name
    try:
        yield
    finally:
        del vars(head)["forward"]
        for handle in handles:
            handle.remove()


class _Scorer:
    """Forward of an output layer within `scored`; two hooks beside it if the layer is frozen."""

    def __init__(self, head: nn.Module, labels_at: Callable[[int], Tensor], finish: Finish):
        self.head, self.labels_at, self.finish = head, labels_at, finish
        self.plain = head.forward
        self.added: Tensor | None = None  # of `biased_logits`
        self.states: Tensor | None = None  # of a frozen layer, while it is called, as the model gave them
        self.known: KnownScores | None = None

    def __call__(self, states: Tensor) -> Tensor:
        labels = aligned(self.labels_at(states.shape[1]), states.shape[1])
        if type(self.head) is not nn.Linear or (self.states is None and self.finish != PLAIN):
            scores = scores_of_layer(self._logits, self.head.out_features, states, labels, self.finish)
            return torch.stack(scores, -1)
        weight, bias = self.head.weight, self.head.bias
        if self.added is not None:
            added = self.added.to(weight.dtype)
            bias = added if bias is None else bias + added
        if self.states is None:
            return torch.stack(token_scores(states, weight, bias, labels), -1)
        weight, bias = weight[: self.finish.tokens], None if bias is None else bias[: self.finish.tokens]
        with_gradient = self.states.requires_grad and torch.is_grad_enabled()
        self.known = known_scores(states, weight, bias, labels, with_gradient, self.finish)
        return states.new_zeros(())

    def _logits(self, states: Tensor) -> Tensor:
        """(n, V) of (n, d), by the layer with its adapters."""
        logits = self.plain(states)
        return logits if self.added is None else logits + self.added

    def detach(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook that runs before all others."""
        self.states = args[0]
        return (args[0].detach(),)

    def attach(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook that runs after all others."""
        scores = torch.stack(self.known.attached(self.states), -1)
        self.states = self.known = None
        return scores
