"""Tokens that are put after the first token of a sequence inside a transformer, and what is read of them (MMRL)."""

# B rows, N tokens of a row without the inserted ones, K inserted tokens, C classes, d width of the tower, D of the
# features; masks have rows (queries) before columns (keys)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def insert_tokens(hidden: Tensor, tokens_Kd: Tensor, present: int) -> Tensor:
    """The states with `tokens` after the first one of each row, in place of those that stand there already.

    Args:
        hidden: (B, N + present, d).
        tokens_Kd: the same for all rows, in any dtype.
        present: number of inserted tokens in `hidden`, 0 at the first layer.

    Returns:
        (B, N + K, d) in the dtype of `hidden`.

    Source: MMRL, arXiv 2503.08497, equations of both encoders; after the class token of an image, and after the
    first token of a text.
    """
    tokens = tokens_Kd.to(hidden.dtype).expand(len(hidden), -1, -1)
    return torch.cat([hidden[:, :1], tokens, hidden[:, 1 + present :]], 1)


def take_tokens(hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, N, d) the states of the row's own tokens and (B, count, d) those of the tokens after its first one."""
    own = torch.cat([hidden[:, :1], hidden[:, 1 + count :]], 1)
    return own, hidden[:, 1 : 1 + count]


def mask_of_inserted(mask: Tensor | None, count: int, causal: bool) -> Tensor | None:
    """A mask over the row's own tokens, made one over the row with `count` tokens inserted after the first.

    Everybody sees the inserted tokens; where later tokens are hidden, those that stand before them do not.

    Args:
        mask: (B, M), 1 = attend; (.., 1 or N, N) bool with True = attend, or a term that is added to the scores; None:
            all are seen, or, in causal attention, all earlier ones.
        causal: an inserted token sees the first token and the inserted ones up to itself; otherwise what the first
            token sees.

    Returns:
        a mask of the same form and dtype over N + count tokens; None stays None.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return torch.cat([mask[:, :1], mask.new_ones(len(mask), count), mask[:, 1:]], 1)
    seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    columns = mask.new_full((*mask.shape[:-1], count), seen)
    one_row = mask.shape[-2] == 1
    if causal and not one_row:
        columns[..., 0, :] = hidden
    wide = torch.cat([mask[..., :1], columns, mask[..., 1:]], -1)
    if one_row:
        return wide
    first = wide[..., :1, :]
    inserted = first.expand(*first.shape[:-2], count, -1)
    if causal:
        inserted = inserted.clone()
        earlier = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()
        inserted[..., 1 : 1 + count] = torch.where(earlier, seen, hidden).to(mask.dtype)
    return torch.cat([first, inserted, wide[..., 1:, :]], -2)


def decoupled_logits(class_BC: Tensor, representation_BC: Tensor, trained_C: Tensor, alpha: float) -> Tensor:
    """(B, C) logits of an evaluation: alpha class + (1 - alpha) representation for classes that were trained, those of
    the class feature alone for new ones.

    Args:
        class_BC, representation_BC: logits by the class feature and by the representation feature of each image.
        trained_C: not 0 for classes that occurred in training.
        alpha: in [0, 1].

    Source: MMRL, arXiv 2503.08497 (decoupling at inference); there all classes of a test set are of one kind.
    """
    return torch.where(trained_C != 0, alpha * class_BC + (1 - alpha) * representation_BC, class_BC)


def frozen_distance(features_ND: Tensor, frozen_ND: Tensor) -> Tensor:
    """(N,) 1 - cosine of each feature and of what the frozen encoder gives in its place.

    Source: MMRL, arXiv 2503.08497 (regularisation of class and text features).
    """
    return 1 - cosine_similarity(features_ND, frozen_ND.to(features_ND.dtype), dim=-1)
