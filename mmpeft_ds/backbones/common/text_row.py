"""The texts of a batch as one row without padding, as language models of transformers read several sequences.

Positions count from 0 in every text. Where they jump back, transformers begins a new sequence: with sdpa and eager it
makes a block-diagonal causal mask of them, with flash-attn it calls the kernel for sequences of different lengths.
`text_attention` calls sdpa for each text.
"""

# T texts, S positions with padding, N tokens of all texts

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.host_copies import both, on_host, to_device
from mmpeft_ds.sites.condition import Segments, conditioned, current

# Arguments that say where texts end in a row.
_ENDS = (text_attention.LENGTHS, "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


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

    def mask(self, masks_T1SS: Tensor | None) -> Tensor:
        """(1, 1, N, N) of (T, 1, S, S) masks, bool or added to scores, None for causal ones: what each token sees of
        its own text, and nothing of the others."""
        text, column = self.segments.text, self._column
        if masks_T1SS is None:
            mine = column[:, None] >= torch.arange(self.width, device=column.device)
        else:
            mine = masks_T1SS[text, 0, column]  # (N, S)
        hidden = False if mine.dtype == torch.bool else torch.finfo(mine.dtype).min
        return mine[:, column].masked_fill(text[:, None] != text[None], hidden)[None, None]

    @property
    def text_of(self) -> Tensor:
        """(1, N) int64, text of each token."""
        return self.segments.text[None]

    def attention_arguments(self, implementation: str) -> dict[str, Any]:
        """Boundaries of texts for attention implementations that need no mask: arguments of transformers'
        `FlashAttentionKwargs`, which then need not be read back from the positions in every layer, or of
        `text_attention`; empty for others, which get a mask."""
        if implementation in text_attention.NAMES:
            return {text_attention.LENGTHS: self.segments.lengths}
        if not implementation.startswith("flash"):
            return {}
        lengths = to_device(torch.tensor(self.segments.lengths, dtype=torch.int32), self.position_ids.device)
        ends = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = max(self.segments.lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def give_texts_rows(model: nn.Module, classes: tuple[str, ...]) -> None:
    """Let layers of these classes, which carry something from token to token, read each text in a row of its own where
    the model reads one row. Padding then stands after a text, which nothing before it depends on."""
    for module in model.modules():
        if type(module).__name__ in classes:
            module.forward = types.MethodType(_in_rows, module)


def _in_rows(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer, whose adapters see rows too. Of several results the first are hidden states, as one row;
    the others, which a later layer of this kind may read, stay in rows."""
    condition = current()
    if condition is None or (segments := condition.segments) is None:
        return type(self).forward(self, *args, **kwargs)
    row = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def split(value: Any) -> Any:
        return segments.split(value) if isinstance(value, Tensor) and value.shape[:2] == row else value

    # without what says where texts end: each has a row now
    kwargs = {name: split(value) for name, value in kwargs.items() if name not in _ENDS}
    with conditioned(dataclasses.replace(condition, segments=None)):
        output = type(self).forward(self, *map(split, args), **kwargs)
    if isinstance(output, tuple):
        return (segments.join(output[0]), *output[1:])
    return segments.join(output)


def _beside(rows: Tensor, index: Tensor) -> Tensor:
    """`index` where `rows` lie."""
    return index if rows.device == index.device else on_host(index)
