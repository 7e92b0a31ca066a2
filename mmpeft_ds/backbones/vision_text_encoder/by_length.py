"""Texts of an encoder as one row without padding, sorted by length, so that attention needs no mask.

Texts of equal length stand beside each other, so that attention sees them as rows of that length: a view of the same
memory, without padding. The boundaries reach it by the condition, also where a block is computed again in the backward
pass. On a CPU alone: on a GPU one launch for all texts takes less time than one for each length.
"""

# T texts, S positions of each with padding, N positions that count, H heads, d width, h width of a head

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmpeft_ds.sites.condition import Condition, Segments, current
from mmpeft_ds.sites.observe import BY_LENGTH


class TextsByLength:
    """The way from T padded rows to one row of N positions, and back.

    Args:
        keep: (T, S) bool, which positions count; at least one in each text.

    Attributes:
        segments: where the texts stand in the row.
        first: (1, N) bool, the first position of each text.
    """

    def __init__(self, keep: Tensor):
        lengths = keep.sum(1)
        self._order = lengths.argsort(stable=True)
        lengths = lengths[self._order]
        text, column = keep[self._order].nonzero(as_tuple=True)
        place = torch.arange(len(text)) - (lengths.cumsum(0) - lengths)[text]
        self._at = self._order[text] * keep.shape[1] + column
        self.segments = Segments(text, place, tuple(lengths.tolist()))
        self.first = (place == 0)[None]

    def row(self, hidden_TSd: Tensor) -> Tensor:
        """(1, N, d)."""
        return hidden_TSd.flatten(0, 1).index_select(0, self._at)[None]

    def condition(self, condition: Condition) -> Condition:
        """What layers that get the row are to read in place of `condition`."""
        found = self.segments
        own_mask = torch.arange(max(found.lengths)) < torch.tensor(found.lengths)[:, None]
        sort = {n: x[self._order] for n in ("tokens", "mask") if (x := getattr(condition, n)) is not None}
        return dataclasses.replace(condition, **sort, own_mask=own_mask, read=self.first, segments=found)

    def unsorted(self, rows: Tensor) -> Tensor:
        """(T, ...) of the texts as they came, from what was computed for them as they stand in the row."""
        return rows.index_select(0, self._order.argsort())


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa for the texts of each length.

    Args:
        query, key, value: (1, H, N, h) of a row of texts; of any shape where there is none.

    Returns:
        (1, N, H, h), and no scores.
    """
    condition = current()
    if condition is None or condition.segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs, start = [], 0
    for length, run in itertools.groupby(condition.segments.lengths):
        number = len(list(run))
        places = slice(start, start + number * length)
        texts = (part[0, :, places].unflatten(1, (number, length)).transpose(0, 1) for part in (query, key, value))
        outputs.append(sdpa_attention_forward(module, *texts, None, **kwargs)[0].flatten(0, 1))
        start = places.stop
    return torch.cat(outputs)[None], None


AttentionInterface.register(BY_LENGTH, attention)
AttentionMaskInterface.register(BY_LENGTH, sdpa_mask)
