"""A stand-in for the package flash-attn 2.8.3 that computes on the CPU: its signatures, its checks, its causal mask.

transformers finds it as it finds the real one (`installing.describe` writes what pip would), so that its own road to
flash-attn, with unpadding and packed sequences, runs on a machine without a GPU.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__version__ = "2.8.3"

calls: list[str] = []  # of the functions below, in order


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """(B, Tq, H, d), attention of q (B, Tq, H, d) over k and v (B, Tk, Hk, d), with H a multiple of Hk.

    Raises:
        RuntimeError: for types and shapes that the real one refuses.
    """
    calls.append("flash_attn_func")
    _check(q, k, v, alibi_slopes, return_attn_probs)
    _expect(q.dim() == 4 and q.shape[0] > 0, "batch size must be positive")
    _expect(k.shape == v.shape == (q.shape[0], *k.shape[1:3], q.shape[3]), "k and v must have the shape of q's batch")
    rows = zip(q, k, v, strict=True)
    return torch.stack([attend(*row, dropout_p, softmax_scale, causal, window_size, softcap) for row in rows])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """(total q, H, d), each sequence by itself; sequence i is rows cu[i] to cu[i + 1].

    Raises:
        RuntimeError: for types and shapes that the real one refuses.
    """
    calls.append("flash_attn_varlen_func")
    _check(q, k, v, alibi_slopes, return_attn_probs)
    _expect(block_table is None, "this stand-in has no paged cache")
    _expect(q.dim() == 3 and k.shape == v.shape == (*k.shape[:2], q.shape[2]), "q, k and v must be (tokens, heads, d)")
    for cu, length, tokens in ((cu_seqlens_q, max_seqlen_q, len(q)), (cu_seqlens_k, max_seqlen_k, len(k))):
        _expect(cu.dtype == torch.int32 and cu.is_contiguous(), "cu_seqlens must be contiguous and of dtype int32")
        # The kernel reads past the end, or leaves rows out, where these do not hold.
        _expect(cu.numel() > 1 and int(cu[-1]) <= tokens, "cu_seqlens must end within the tokens")
        _expect(int(cu.diff().max()) <= int(length), "a sequence is longer than max_seqlen")
    _expect(cu_seqlens_q.shape == cu_seqlens_k.shape, "cu_seqlens of queries and keys must have the same length")
    out = torch.zeros_like(q)
    starts = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
    for (first_q, end_q), (first_k, end_k) in starts:
        row = (q[first_q:end_q], k[first_k:end_k], v[first_k:end_k])
        out[first_q:end_q] = attend(*row, dropout_p, softmax_scale, causal, window_size, softcap)
    return out


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object, **kwargs: object) -> Tensor:
    """transformers imports it for its paged cache of serving, which no model here uses."""
    raise NotImplementedError("the stand-in has no paged cache")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    """(Tq, H, d) of one sequence, q (Tq, H, d), k and v (Tk, Hk, d): scores and sums in float32, as in the kernel."""
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = (x.float().transpose(0, 1) for x in (q, k, v))
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = queries @ keys.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    hidden = ~visible(len(q), len(k), causal, window)
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    probabilities = probabilities.masked_fill(hidden, 0.0)  # a query without keys gives zeros, not NaN
    probabilities = torch.nn.functional.dropout(probabilities, dropout_p).to(q.dtype).float()
    return (probabilities @ values).transpose(0, 1).to(q.dtype)


def visible(queries: int, keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """(queries, keys) bool. The mask stands at the bottom right: the last query is at the last key."""
    at_query = torch.arange(queries).unsqueeze(1) + keys - queries
    at_key = torch.arange(keys).unsqueeze(0)
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen &= (at_key <= at_query + right) if right >= 0 else True
    return seen & ((at_key >= at_query - left) if left >= 0 else True)


def _check(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, return_attn_probs: bool) -> None:
    half = (torch.float16, torch.bfloat16)
    _expect(q.dtype in half, "FlashAttention only support fp16 and bf16 data type")
    _expect(k.dtype == v.dtype == q.dtype, "query, key and value must have the same dtype")
    _expect(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    _expect(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    _expect(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    _expect(alibi_slopes is None and not return_attn_probs, "the stand-in has neither ALiBi nor probabilities")


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)
