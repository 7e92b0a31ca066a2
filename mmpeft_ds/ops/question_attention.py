"""Attention of image tokens to the question inside a low-rank bottleneck (MokA)."""

# B texts, L positions, g parts of a fused projection, r rank

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def question_attention(h_BLw: Tensor, asking: Tensor, read: Tensor, parts: int = 1) -> Tensor:
    """softmax(h h^T / sqrt(r)) h over the tokens that are read, for the tokens that ask; each part by itself.

    Queries, keys and values are the bottleneck itself, without maps of their own.

    Args:
        h_BLw: (B, L, g r) bottleneck of all tokens, the parts beside each other.
        asking: (B, L) bool, image tokens.
        read: (B, L) bool, tokens of the question. Where a text has none, nothing is read.
        parts: g.

    Returns:
        (B, L, g r), zeros where nobody asks.

    Source: arXiv 2506.05191, and the released code for image and text.
    """
    h = h_BLw.unflatten(-1, (parts, -1)).transpose(1, 2)
    some = read.any(1, keepdim=True)
    # A row that reads nothing reads everything, and that is dropped below: a softmax over nothing has no gradient.
    attended = F.scaled_dot_product_attention(h, h, h, attn_mask=(read | ~some)[:, None, None])
    return torch.where((asking & some)[..., None], attended.transpose(1, 2).flatten(2), 0)
