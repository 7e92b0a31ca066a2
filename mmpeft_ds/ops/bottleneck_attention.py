"""Cross-attention between two bottlenecks: the baseline that routing functions are compared with."""

# B batch, L text length, m conditioning tokens, q width of the bottleneck

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bottleneck_attention(
    h_BLq: Tensor,
    i_Bmq: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(q / heads)) V, heads joined by the last of the weights; no biases.

    Args:
        h_BLq: bottleneck of the text, which asks.
        i_Bmq: bottleneck of the condition, which answers.
        weights: maps to queries, keys and values and from the joined heads, each (q, q).
        heads: a divisor of q.
        mask: (B, m), True = keep; a row that keeps none gives zeros.

    Returns:
        (B, L, q). With m = 1 the text has no say: the softmax is 1.

    Raises:
        ValueError: if `heads` does not divide q.

    Source: Qu, Tuytelaars, Moens, ECCV 2024, arXiv 2403.09377, the bottleneck cross-attention baseline.
    """
    width = h_BLq.shape[-1]
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a bottleneck of width {width}")
    to_q, to_k, to_v, to_out = weights

    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, width // heads)).transpose(1, 2)

    q, k, v = split(F.linear(h_BLq, to_q)), split(F.linear(i_Bmq, to_k)), split(F.linear(i_Bmq, to_v))
    scores = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
    if mask is None:
        attention = scores.softmax(-1)
    else:
        keep = mask.bool()[:, None, None]
        attention = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1)
        attention = torch.where(keep, attention, 0)  # a row without any would spread over what it must not see
    return F.linear((attention @ v).transpose(1, 2).flatten(2), to_out)
