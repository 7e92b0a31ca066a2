"""The texts of a batch as one row without padding, as language models of transformers read several sequences.

Positions count from 0 in every text. Where they jump back, transformers begins a new sequence: with sdpa and eager it
makes a block-diagonal causal mask of them, with flash-attn it calls the kernel for sequences of different lengths.
`text_attention` calls sdpa for each text.
"""

# T texts, S positions with padding, N tokens of all texts

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.host_copies import both, on_host, to_device
from mmpeft_ds.sites.condition import Segments


class TextRow:
    """The way from T padded rows to one row of N tokens.

    Args:
        keep: (T, S) bool, which positions hold a token; at least one in each text.

    Attributes:
        width: S.
        segments: where the texts stand in the row.
        position_ids: (1, N) of each token within its text.
    """

    def __init__(self, keep: Tensor):
        self.width = keep.shape[1]
        known = on_host(keep)
        text, column = known.nonzero(as_tuple=True)
        lengths = known.sum(1)
        place = torch.arange(len(text)) - (lengths.cumsum(0) - lengths)[text]
        text, self._column, self._place = (to_device(t, keep.device) for t in (text, column, place))
        self.segments = Segments(text, self._place, tuple(lengths.tolist()))
        self.position_ids = self._place[None]

    def of(self, rows: Tensor) -> Tensor:
        """(1, N, ...) of (T, S, ...)."""
        return rows[_beside(rows, self.segments.text), _beside(rows, self._column)][None]

    def labels(self, labels_TS: Tensor) -> Tensor:
        """(1, N): what is asked of each token; of the first of a text nothing, since what stands before it in the row
        is of another text."""
        return both(lambda labels: self.of(labels).masked_fill(_beside(labels, self._place) == 0, -100), labels_TS)

    @property
    def text_of(self) -> Tensor:
        """(1, N) int64, text of each token."""
        return self.segments.text[None]

    def attention_arguments(self, implementation: str) -> dict[str, Any]:
        """Where texts end, for implementations that need no mask: arguments of transformers' `FlashAttentionKwargs`,
        which then need not be read back from the positions in every layer, or of `text_attention`; none for others,
        which get a mask."""
        if implementation == text_attention.NAME:
            return {text_attention.LENGTHS: self.segments.lengths}
        if not implementation.startswith("flash"):
            return {}
        lengths = to_device(torch.tensor(self.segments.lengths, dtype=torch.int32), self.position_ids.device)
        ends = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = max(self.segments.lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _beside(rows: Tensor, index: Tensor) -> Tensor:
    """`index` where `rows` lie."""
    return index if rows.device == index.device else on_host(index)
