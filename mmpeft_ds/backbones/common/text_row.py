"""The texts of a batch as one row without padding, as language models of transformers read several sequences.

Positions count from 0 in every text. Where they jump back, transformers begins a new sequence: with sdpa and eager it
makes a block-diagonal causal mask of them, with flash-attn it calls the kernel for sequences of different lengths.
"""

# T texts, S positions with padding, N tokens of all texts

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

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
        self._at = keep.nonzero(as_tuple=True)
        lengths = keep.sum(1)
        text = self._at[0]
        place = torch.arange(len(text), device=keep.device) - (lengths.cumsum(0) - lengths)[text]
        self.segments = Segments(text, place, tuple(lengths.tolist()))
        self.position_ids = place[None]

    def of(self, rows: Tensor) -> Tensor:
        """(1, N, ...) of (T, S, ...)."""
        return rows[self._at][None]

    def labels(self, labels_TS: Tensor) -> Tensor:
        """(1, N): what is asked of each token; of the first of a text nothing, since what stands before it in the row
        is of another text."""
        return self.of(labels_TS).masked_fill(self.position_ids == 0, -100)

    @property
    def text_of(self) -> Tensor:
        """(1, N) int64, text of each token."""
        return self.segments.text[None]

    def attention_arguments(self, implementation: str) -> dict[str, Any]:
        """Arguments of transformers' `FlashAttentionKwargs`, so that it need not read the lengths back from the
        positions in every layer; none for other implementations, which get a mask."""
        if not implementation.startswith("flash"):
            return {}
        lengths = torch.tensor(self.segments.lengths, dtype=torch.int32, device=self.position_ids.device)
        ends = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = max(self.segments.lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
