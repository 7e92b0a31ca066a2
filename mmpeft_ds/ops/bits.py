"""Boolean matrices at one bit an entry: eight columns a byte, the lowest bit first."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Eight bytes of 0 or 1, times this, hold them as the bits of the highest byte (little-endian).
_GATHER_BITS = 0x0102040810204080
# Counts of a byte stay below 256.
_ROWS = 255


def pack(mask: Tensor) -> Tensor:
    """(n, m) bool to (n, ceil(m / 8)) uint8; the last byte is filled with zeros."""
    fill = -mask.shape[1] % 8
    mask = torch.nn.functional.pad(mask, (0, fill)) if fill else mask.contiguous()
    return ((mask.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack(bits: Tensor) -> Tensor:
    """(n, w) uint8 to (n, 8 w) bool."""
    return _spread(bits).view(torch.bool)


def set_bits(bits: Tensor, column: int, mask: Tensor) -> None:
    """Or `mask` (n, m) into packed `bits` (n, w), in place, its first column at `column`."""
    before = column % 8
    packed = pack(torch.nn.functional.pad(mask, (before, 0)) if before else mask)
    bits[:, column // 8 : column // 8 + packed.shape[1]] |= packed


def row_counts(bits: Tensor) -> Tensor:
    """Set bits of each row of (n, w), int64 (n,)."""
    words = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).view(torch.int64)
    # sums of neighbouring bits, then of pairs, of fours, of bytes
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56).sum(1)


def column_counts(bits: Tensor) -> Tensor:
    """Set bits of each column of (n, w), int64 (8 w,)."""
    total = torch.zeros(8 * bits.shape[1], dtype=torch.int64, device=bits.device)
    for block in bits.split(_ROWS):
        # eight counts in one word: no carry with at most 255 rows
        total += _spread(block).sum(0).view(torch.uint8)
    return total


def _spread(bits: Tensor) -> Tensor:
    """(n, w) uint8 to (n, w) int64 whose eight bytes are the bits."""
    return _table(bits.device).index_select(0, bits.reshape(-1).int()).view(bits.shape)


@lru_cache
def _table(device: torch.device) -> Tensor:
    values = torch.arange(256, device=device)
    bits = (values[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(256)
