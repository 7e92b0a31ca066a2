"""Changes that prompts make to a call of a frozen module: longer masks, a cache seen with a prefix before it."""

# B batch, N query tokens, M key tokens, P prompt tokens, H heads, K key heads, d width of a head

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft_ds.errors import BadInput


def longer_mask(mask: Any, prompts: int, where: str, own_rows: int | None = None) -> Any:
    """`mask` for `prompts` more keys, which stand first and which everybody sees.

    Args:
        mask: (.., N, M) bool with True = attend or a term added to the scores; (B, M) with 1 = attend; or None.
        own_rows: N, if the prompts stand before the queries as well; their rows see everything.
        where: named in errors.

    Raises:
        BadInput: a mask that is no tensor (flex attention).
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise BadInput(f"{where}: prompts cannot lengthen a {type(mask).__name__}. Use attention sdpa or eager.")
    seen = 1 if mask.dim() == 2 or mask.dtype == torch.bool else 0
    rows = prompts if own_rows is not None and mask.dim() > 2 and mask.shape[-2] == own_rows > 1 else 0
    pad = (prompts, 0, rows, 0) if rows else (prompts, 0)
    return F.pad(mask, pad, value=seen)


def causal_mask(queries: int, keys: int, past: int, prompts: int, device: torch.device) -> Tensor:
    """(1, 1, N, P + M) bool: query i sees every prompt and the keys up to past + i."""
    at = torch.arange(queries, device=device)[:, None] + past
    own = torch.arange(keys, device=device)[None, :] <= at
    return F.pad(own, (prompts, 0), value=True)[None, None]


class PrefixedCache:
    """A cache as an attention module sees it whose keys and values have a prefix. The prefix is never stored.

    Args:
        real: the cache of that attention, or None where there is none (training, encoders).
        key: (P, K d), and value the same.
    """

    def __init__(self, real: Any, key: Tensor, value: Tensor):
        self._real, self._key, self._value = real, key, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store (B, K, N, d); returns all there are so far with the prefix before them, (B, K, P + M, d)."""
        if self._real is not None:
            key, value = self._real.update(key, value, *args, **kwargs)
        return _before(self._key, key), _before(self._value, value)


def _before(prefix: Tensor, states: Tensor) -> Tensor:
    heads = prefix.to(states.dtype).view(len(prefix), states.shape[1], states.shape[3]).transpose(0, 1)
    return torch.cat([heads.expand(states.shape[0], -1, -1, -1), states], 2)
