"""Attention of texts that stand in one row, one text after the other, without a mask.

A mask that separates texts has as many entries as the square of the row, and sdpa computes them all, those between two
texts too. Each text by itself needs no mask, so that sdpa takes its causal kernel: of a row of 4,096 tokens in five
texts a tenth of the entries are left. It is registered with transformers under a name of its own, so that layers pass
the lengths of the texts to it, also where a block is computed again in the backward pass.
"""

# H heads, N tokens of all texts, d width of a head

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmpeft_ds.sites.condition import current

NAME = "sdpa_by_text"
LENGTHS = "text_lengths"  # argument of the model's forward that reaches every attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    text_lengths: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa for each text of a row; with no `text_lengths`, for the rows as they are.

    Args:
        query, key, value: (1, H, N, d), or (B, H, S, d) for rows as they are.
        text_lengths: tokens of each text, N together.

    Raises:
        ValueError: the row has another number of tokens, or a mask.
    """
    if not text_lengths:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None or query.shape[2] != sum(text_lengths):
        raise ValueError(
            f"texts of {sum(text_lengths)} tokens in a row of {query.shape[2]}"
            f"{'' if attention_mask is None else ' with a mask'}"
        )
    window = kwargs.get("sliding_window")  # which sdpa knows by its mask alone
    outputs = []
    for text in zip(*(part.split(text_lengths, dim=2) for part in (query, key, value)), strict=True):
        near = _window_mask(text[0], window) if window and text[0].shape[2] > window else None
        outputs.append(sdpa_attention_forward(module, *text, near, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _window_mask(query: Tensor, window: int) -> Tensor:
    """(1, 1, N, N) bool: a token sees itself and the `window` - 1 before it."""
    seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
    return (seen.tril() & seen.triu(1 - window))[None, None]


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None for a row of texts; else what sdpa gets."""
    condition = current()
    return None if condition is not None and condition.segments is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
