"""Contrast of images and texts with soft targets, and matching against hard negatives."""

# B queries, K keys or candidates, E shared width

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LOWEST, HIGHEST = 0.001, 0.5


def clamp_temperature(temperature: Tensor) -> Tensor:
    """Into [0.001, 0.5], as ALBEF and BLIP do at every forward."""
    return temperature.clamp(LOWEST, HIGHEST)


def similarities(queries_BE: Tensor, keys_KE: Tensor, temperature: Tensor | float, keep_K: Tensor | None) -> Tensor:
    """(B, K) inner products over the temperature; keys that do not count get the lowest finite value."""
    logits = queries_BE @ keys_KE.T / temperature
    return logits if keep_K is None else logits.masked_fill(~keep_K, torch.finfo(logits.dtype).min)


def soft_targets(
    ids_B: Tensor,
    key_ids_K: Tensor,
    teacher_BK: Tensor | None = None,
    alpha: float = 0.0,
    keep_K: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Targets of each query: keys of its id in equal shares, mixed with the teacher's distribution.

    Args:
        ids_B, key_ids_K: equal ids are the same picture, or its text.
        teacher_BK: similarities of a momentum model, over the temperature; None only with alpha 0.
        alpha: share of the teacher.
        keep_K: bool, keys that count; None: all.
        dtype: of the result, without a teacher.

    Returns:
        (B, K), without gradient; rows sum to 1 (to 0 without alpha, if no key has the id).

    Source: Aurora, arXiv 2305.08381, released code; ALBEF, arXiv 2107.07651.
    """
    same = ids_B[:, None] == key_ids_K
    if keep_K is not None:
        same = same & keep_K
    hard = same.to(dtype if teacher_BK is None else teacher_BK.dtype)
    hard = hard / hard.sum(1, keepdim=True).clamp(min=1)
    if teacher_BK is None or alpha == 0:
        return hard
    return alpha * torch.softmax(teacher_BK.detach(), 1) + (1 - alpha) * hard


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """(B,) cross-entropy of each row against soft targets."""
    # where, not a product alone: a key that does not count has logit -1e38 and target 0
    losses = torch.where(targets_BK > 0, targets_BK * torch.log_softmax(logits_BK, 1), 0.0)
    return -losses.sum(1)


def negative_weights(
    queries_BE: Tensor,
    candidates_KE: Tensor,
    ids_B: Tensor,
    candidate_ids_K: Tensor,
    temperature: Tensor | float,
    keep_K: Tensor | None = None,
) -> Tensor:
    """(B, K) weights by which candidates are drawn as hard negatives: the softmax of the similarities, with zeros
    where the ids are equal. Rows are not normalised again, and no gradient passes.

    Source: as `soft_targets`.
    """
    with torch.no_grad():
        weights = torch.softmax(similarities(queries_BE, candidates_KE, temperature, keep_K), 1)
        return weights.masked_fill(ids_B[:, None] == candidate_ids_K, 0.0)


def draw(weights_BK: Tensor, allowed_BK: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """One candidate for every row, by the inverse of the cumulated weights.

    A row whose weights all vanish draws evenly among those allowed, so that it draws at all.

    Args:
        weights_BK: not negative, zero where not allowed.
        allowed_BK: bool.
        uniform_B: in [0, 1); the same numbers draw the same candidates whoever asks.

    Returns:
        (B,) index, and (B,) bool: there was a candidate; without one the index means nothing.
    """
    weights = torch.where(allowed_BK, weights_BK.double(), 0.0)
    empty = weights.sum(1, keepdim=True) <= 0
    weights = torch.where(empty, allowed_BK.double(), weights)
    cumulated = weights.cumsum(1)
    wanted = uniform_B.double()[:, None] * cumulated[:, -1:]
    index = (cumulated <= wanted).sum(1).clamp(max=weights.shape[1] - 1)
    return index, allowed_BK.any(1)


def matching_loss(logits_3B2: Tensor, possible_2B: Tensor | None = None) -> Tensor:
    """(B,) loss of a matching head, whose mean over pairs is that over all rows.

    Args:
        logits_3B2: rows of the B matching pairs, then of each text with a wrong image, then of each image with a
            wrong text; class 1 means match.
        possible_2B: bool, which negatives there were; None: all.

    Source: as `soft_targets`.
    """
    pairs = len(logits_3B2) // 3
    labels = torch.zeros(3 * pairs, dtype=torch.int64, device=logits_3B2.device)
    labels[:pairs] = 1
    losses = cross_entropy(logits_3B2, labels, reduction="none")
    if possible_2B is not None:
        kept = torch.cat([possible_2B.new_ones(pairs), possible_2B])
        losses = torch.where(kept, losses, torch.zeros_like(losses))
    return losses.view(3, pairs).sum(0) / 3
