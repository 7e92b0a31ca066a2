"""Losses of given tokens from the states before an output layer, without the logits of all positions.

Logits of 4 x 2,048 positions over 152,064 tokens take 2.3 GiB in bfloat16, and 15 GiB with their float32 copy and
gradients. Here at most `LOGITS` of them exist together. Only a loss of each token alone is read of them, so where
the layer is frozen its gradient towards the state is known in the forward pass already, and the backward pass needs
neither logits nor weight. Where the layer trains, the backward pass computes the logits again, as many at a time.
"""

# T texts, S positions, K last positions with labels, d width, V tokens of the vocabulary, N labelled positions

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmpeft_ds.host_copies import nonzero, on_host
from mmpeft_ds.ops.finished_logits import PLAIN, Finish, touchable
from mmpeft_ds.ops.precision import full_dtype

LOGITS = 1 << 26  # that exist together, over all tokens of some positions
POSITIONS = 1024  # whose gradients towards the states are made together in the backward pass


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
        """Scores from the (T, S, 3) output of a layer within `scored_head.scored`."""
        nll, uniform, right = touchable(outputs).unbind(-1)
        return cls(nll, uniform, right > 0.5)


def token_scores(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll, uniform and right, each (T, S), of the tokens `labels` under `states @ weight.T + bias`; 0 without label.

    Args:
        states: (T, S, d).
        weight: (V, d), bias: (V,).
        labels: (T, S) int64, -100 at positions without a label.

    Returns:
        three tensors (T, S) in at least float32. nll and uniform have gradients towards `states`, and towards weight
        and bias where these require it; right is 1 where the label is the most likely token, else 0. Gradients of
        these gradients are refused by autograd.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        rows = labelled(labels)
        scores = _Trained.apply(states.flatten(0, 1)[rows], weight, bias, labels.flatten()[rows])
        return tuple(score.new_zeros(labels.numel()).index_put((rows,), score).view(labels.shape) for score in scores)
    return known_scores(states, weight, bias, labels).attached(states)


def scores_of_layer(
    layer: Callable[[Tensor], Tensor], tokens: int, states: Tensor, labels: Tensor, finish: Finish = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `token_scores`, for a layer that is more than a weight and a bias, such as one with adapters.

    It is run on some positions at a time and again in the backward pass, as often as there are labels for.

    Args:
        layer: logits (n, V) of states (n, d), of each position by itself.
        tokens: V.
        finish: what the model makes of the logits.
    """
    rows = labelled(labels)
    flat, asked = states.flatten(0, 1)[rows], labels.flatten()[rows]

    def scores(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        logits = layer(flat[part])
        logits = logits.to(full_dtype(logits.dtype))
        logits = logits if finish == PLAIN else finish(logits)
        log_total = logits.logsumexp(1)
        right = (logits.detach().argmax(1) == asked[part]).to(logits.dtype)
        return log_total - logits.gather(1, asked[part, None])[:, 0], log_total - logits.mean(1), right

    # Autograd keeps about four matrices of a part; without a label the layer still takes part in the backward pass.
    parts = list(_slices(len(rows), max(1, LOGITS // (4 * tokens)))) or [slice(0, 0)]
    scored = [checkpoint(scores, part, use_reentrant=False) for part in parts]
    return tuple(
        torch.cat(of_parts).new_zeros(labels.numel()).index_put((rows,), torch.cat(of_parts)).view(labels.shape)
        for of_parts in zip(*scored, strict=True)
    )


def labelled(labels: Tensor) -> Tensor:
    """(N,) numbers of the positions (of T * S) that have a label."""
    count = int((on_host(labels) != -100).sum())
    return nonzero(labels.flatten() != -100, count)[:, 0]


@dataclass
class KnownScores:
    """Scores under a frozen layer, and their gradients towards the states, before the states are joined to them.

    Attributes:
        rows: (N,) of `labelled`.
        nll, uniform, right: (N,).
        gradient: (N, d) of nll towards the states; None without gradient.
        difference: (N, d) what the gradient of uniform has more than that of nll.
    """

    rows: Tensor
    nll: Tensor
    uniform: Tensor
    right: Tensor
    gradient: Tensor | None
    difference: Tensor | None

    def attached(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """nll, uniform and right, each (T, S); the first two with gradients towards the `states` (T, S, d)."""
        nll, uniform = self.nll, self.uniform
        if self.gradient is not None:
            nll, uniform = _Known.apply(states, nll, uniform, self.rows, self.gradient, self.difference)
        size, shape = states.shape[0] * states.shape[1], states.shape[:2]
        return tuple(s.new_zeros(size).index_put((self.rows,), s).view(shape) for s in (nll, uniform, self.right))


def known_scores(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    with_gradient: bool | None = None,
    finish: Finish = PLAIN,
) -> KnownScores:
    """Scores under a frozen layer; arguments as of `token_scores`.

    Args:
        with_gradient: None: if `states` require it and autograd is on.
        finish: what the model makes of the logits; its `tokens` are those of weight and bias already.
    """
    if with_gradient is None:
        with_gradient = states.requires_grad and torch.is_grad_enabled()
    rows = labelled(labels)
    with torch.no_grad():
        return _known(states.flatten(0, 1), rows, weight, bias, labels.flatten()[rows], with_gradient, finish)


def _known(
    flat: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    with_gradient: bool,
    finish: Finish,
) -> KnownScores:
    nll, uniform, right = flat.new_empty(3, len(rows), dtype=full_dtype(flat.dtype))
    gradient = difference = None
    if with_gradient:
        gradient, difference = flat.new_empty(2, len(rows), flat.shape[1])
        mean = weight.mean(0)
    for part in _parts(len(rows), weight):
        asked = labels[part]
        chunk = _Chunk.of(flat[rows[part]], weight, bias, asked, finish)
        nll[part], uniform[part], right[part] = chunk.nll, chunk.uniform, chunk.right
        if gradient is not None:
            to_logits = chunk.exponentials.div_(chunk.total)
            to_logits.scatter_add_(1, asked[:, None], to_logits.new_full((len(asked), 1), -1.0))
            if chunk.slope is not None:
                to_logits.mul_(chunk.slope)
            gradient[part] = to_logits.to(weight.dtype) @ weight
            # Towards the logits, the gradient of `uniform` is p - 1 / V and that of `nll` is p - 1 at the label and p
            # elsewhere. The difference has no p in it, so it is made of rows of the weight alone, unless the logits
            # are capped, each by itself.
            if chunk.slope is None:
                difference[part] = weight[asked] - mean
            else:
                at_label = chunk.slope.gather(1, asked[:, None])
                between = chunk.slope.div_(-len(weight)).scatter_add_(1, asked[:, None], at_label)
                difference[part] = between.to(weight.dtype) @ weight
                del between
            del to_logits
        del chunk  # before the next one is made
    if gradient is not None and finish.scale != 1:
        gradient.mul_(finish.scale)
        difference.mul_(finish.scale)
    return KnownScores(rows, nll, uniform, right, gradient, difference)


@dataclass
class _Chunk:
    """Scores of some positions; their probabilities, `exponentials / total` (n, V) and (n, 1); and the derivatives of
    a cap of the logits, `slope` (n, V), if there is one."""

    nll: Tensor
    uniform: Tensor
    right: Tensor
    exponentials: Tensor
    total: Tensor
    slope: Tensor | None

    @classmethod
    def of(cls, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, finish: Finish = PLAIN) -> _Chunk:
        """Scores of `labels` (n,) from `states` (n, d). Works in place: one matrix (n, V) besides the logits."""
        logits = functional.linear(states, weight, bias)
        logits = logits.to(full_dtype(logits.dtype))
        slope = finish.apply_(logits)
        top, index = logits.max(1, keepdim=True)
        below = logits.sub_(top)
        at_label, mean = below.gather(1, labels[:, None])[:, 0], below.mean(1)
        exponentials = below.exp_()
        total = exponentials.sum(1, keepdim=True)
        log_total = total[:, 0].log()
        return cls(log_total - at_label, log_total - mean, index[:, 0] == labels, exponentials, total, slope)


class _Known(torch.autograd.Function):
    """Joins scores whose gradients are known to the states (T, S, d) that they were computed from."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, nll: Tensor, uniform: Tensor, rows: Tensor, gradient: Tensor, difference: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, gradient, difference)
        ctx.shape = states.shape
        return nll.view_as(nll), uniform.view_as(uniform)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, gradient, difference = ctx.saved_tensors
        nll, uniform = (g[:, None] for g in output_gradients)  # zeros where the loss does not use one
        full = gradient.new_zeros(ctx.shape)
        flat = full.view(-1, full.shape[-1])
        for part in _slices(len(rows), POSITIONS):
            row = (nll[part] + uniform[part]) * gradient[part] + uniform[part] * difference[part]
            flat[rows[part]] = row.to(flat.dtype)
        return full, None, None, None, None, None


class _Trained(torch.autograd.Function):
    """Scores nll, uniform and right, each (N,), from states (N, d) and labels (N,), under a layer that trains."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        nll, uniform, right = states.new_empty(3, len(states), dtype=full_dtype(states.dtype))
        for part in _parts(len(states), weight):
            chunk = _Chunk.of(states[part], weight, bias, labels[part])
            nll[part], uniform[part], right[part] = chunk.nll, chunk.uniform, chunk.right
            del chunk  # before the next one is made
        ctx.save_for_backward(states, weight, bias, labels)
        ctx.mark_non_differentiable(right)
        return nll, uniform, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, labels = ctx.saved_tensors
        nll, uniform = (g[:, None] for g in output_gradients[:2])
        full, needed = full_dtype(states.dtype), ctx.needs_input_grad
        to_states = torch.zeros_like(states) if needed[0] else None
        to_weight = torch.zeros_like(weight, dtype=full) if needed[1] else None
        to_bias = torch.zeros_like(bias, dtype=full) if needed[2] else None
        for part in _parts(len(states), weight):
            chunk = _Chunk.of(states[part], weight, bias, labels[part])
            to_logits = chunk.exponentials.mul_((nll[part] + uniform[part]) / chunk.total)
            to_logits.sub_(uniform[part] / len(weight))
            to_logits.scatter_add_(1, labels[part, None], -nll[part])
            if to_bias is not None:
                to_bias += to_logits.sum(0)
            to_logits = to_logits.to(weight.dtype)
            if to_weight is not None:
                # Adds in place; `+=` of a product would hold another matrix of the size of the weight.
                if to_weight.dtype == weight.dtype:
                    to_weight.addmm_(to_logits.T, states[part])
                else:
                    to_weight += to_logits.T @ states[part]
            if to_states is not None:
                to_states[part] = to_logits @ weight
            del chunk, to_logits
        cast = [None if g is None else g.to(like.dtype) for g, like in ((to_weight, weight), (to_bias, bias))]
        return to_states, *cast, None


def _parts(rows: int, weight: Tensor) -> Iterator[slice]:
    """Slices of `rows` positions whose logits may exist together."""
    return _slices(rows, max(1, LOGITS // max(1, len(weight))))


def _slices(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, rows, step))
