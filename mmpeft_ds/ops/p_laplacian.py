"""p-Laplacian message passing on attention maps: the dense forms, which hold every node difference at once."""

# B batch, H heads, N query tokens, M value tokens, G pooled value tokens, b channels of a node

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpeft_ds.ops.precision import full_dtype

EPS = 1e-8


def p_laplacian(
    A: Tensor,
    f: Tensor,
    g: Tensor,
    p: Tensor | float,
    mu: Tensor | float,
    *,
    self_term: bool,
    square: bool,
    eps: float = EPS,
    exact: bool = True,
    offset: int | None = None,
) -> Tensor:
    """One p-Laplacian step over the edges of an attention map.

    With n_ij = || sqrt(A_ij + eps) (g_j - f_i) + eps ||, w_ij = A_ij n_ij^(p-2) and c = 2 mu / p:
    U_i = (sum_j w_ij g_j + [c f_i]) / (sum_j w_ij + c).

    Args:
        A: attention probabilities after masks and before dropout, (B, H, N, M); pooled maps need not sum to 1. A row
            without any key must be zero, as `attention_probabilities` gives it, not NaN.
        f: query nodes, (B, H, N, b).
        g: value nodes, (B, H, M, b).
        p: exponent, one element or one per head, (H,); it and `mu` receive gradients.
        mu: strength of the pull to the row's own node, > 0, one element or one per head.
        self_term: keep c f_i in the numerator. Published results have it on square graphs only.
        square: rows and columns are the same nodes (f is g, or the last rows of g), so that each row has a self loop,
            whose difference is exactly zero.
        eps: keeps edges between equal nodes finite.
        exact: False drops eps from all edges but the self loops: w_ij = A_ij^(p/2) |g_j - f_i|^(p-2), where a distance
            counts at least eps sqrt(b).
        offset: column of the self loop of row 0 of a square graph; M - N when not given.

    Returns:
        (B, H, N, b) in the dtype of `f`; half precision is computed in float32, where eps would be 0 in half.

    Raises:
        ValueError: shapes that do not belong together.

    Source: Wu et al., "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models", AAAI 2024, as
    released; eqs. 13-15 of the paper are `p_laplacian_published`.
    """
    check_shapes(A, f, g)
    out = f.dtype
    with torch.autocast(f.device.type, enabled=False):
        A, f, g, p, mu = upcast(A, f, g, p, mu)
        own = self_loops(*A.shape[-2:], offset, A.device) if square else None
        apart = differences(f, g, own)
        weight = (_weights if exact else _weights_without_eps)(A, apart, p, eps, own)
        c = 2 * mu / p
        total = weight.sum(-1, keepdim=True) + c
        if not square:
            U = (weight @ g + c * f if self_term else weight @ g) / total
        else:
            # The self loop may hold nearly all of a row. Its node taken out of the sum, U - f and with it the gradient
            # of p keep their digits in float32.
            moved = (weight.unsqueeze(-3) * apart).sum(-1).mT
            U = f + (moved if self_term else moved - c * f) / total
        return U.to(out)


def p_laplacian_published(
    A: Tensor, q: Tensor, v: Tensor, p: Tensor | float, mu: Tensor | float, *, eps: float = EPS
) -> Tensor:
    """The step as published: query and value nodes in one bipartite graph, with degrees on both sides.

    Rows of A sum to 1, so query degrees are 1 and the value nodes are divided by the root of the column sums; then
    w_ij = A_ij^(p/2) |q_i - g_j|^(p-2) and the query's own node stays in the numerator. A column sum looks at all
    queries: under a causal mask it would look into the future.

    Args:
        A: attention probabilities, rows sum to 1 (or are zero), (B, H, N, M).
        q: query nodes, (B, H, N, b).
        v: value nodes, (B, H, M, b); a node that no query attends to takes no part.
        p, mu: as in `p_laplacian`.
        eps: a distance counts at least eps sqrt(b), which the paper leaves open.

    Returns:
        Rows of the query nodes, (B, H, N, b) in the dtype of `q`.

    Source: AAAI 2024 paper, eqs. 9-15, in the closed form that one application allows.
    """
    check_shapes(A, q, v)
    out = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        A, q, v, p, mu = upcast(A, q, v, p, mu)
        g = v * inverse_root(A.sum(-2)).unsqueeze(-1)
        return p_laplacian(A, q, g, p, mu, self_term=True, square=False, eps=eps, exact=False).to(out)


def attention_probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, causal: bool = False, scaling: float | None = None
) -> Tensor:
    """Softmax attention as a matrix, in at least float32; rows without any key are zero instead of NaN.

    Args:
        q: (B, H, N, d).
        k: (B, H, M, d).
        mask: broadcastable to (B, H, N, M): bool with True = attend, or a term added to the scores.
        causal: query i sees keys up to i + M - N.
        scaling: factor on the scores, d^(-1/2) when not given.

    Returns:
        (B, H, N, M) in float32, or float64 for float64 inputs.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = upcast(q, k)
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
            )
        if causal:
            rows, columns = scores.shape[-2:]
            ahead = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(columns - rows + 1)
            scores = scores.masked_fill(ahead, -math.inf)
        if mask is None and (not causal or scores.shape[-2] <= scores.shape[-1]):
            return scores.softmax(-1)
        empty = scores.amax(-1, keepdim=True) == -math.inf
        # Softmax of a row of -inf is NaN, and so is its gradient: such a row is scored 0 and zeroed afterwards.
        return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def pool_keys(x: Tensor, groups: int, dim: int) -> Tensor:
    """Adaptive mean over a token axis: bin t takes the tokens floor(t M / G) to ceil((t + 1) M / G) - 1.

    Bins overlap where `groups` does not divide the axis. Masks play no part and nothing is normalised again.

    Args:
        x: attention map (pool its key axis) or values (pool their token axis).
        groups: G, any number >= 1.
        dim: the token axis.

    Returns:
        `x` with `dim` of size G, same dtype.

    Source: the cross-attention graph of the released method.
    """
    x = x.movedim(dim, -1)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        pooled = wide @ _bins(x.shape[-1], groups, wide.dtype)  # half the time on small maps, and less on large ones
    else:
        pooled = F.adaptive_avg_pool1d(wide.reshape(-1, 1, x.shape[-1]), groups).reshape(*x.shape[:-1], groups)
    return pooled.to(x.dtype).movedim(-1, dim)


def bins(keys: int, groups: int, like: Tensor) -> Tensor:
    """(M, G) matrix that averages keys into the bins of `pool_keys`, in the dtype of computation of `like`."""
    bin_ = torch.arange(groups, device=like.device)
    first = bin_ * keys // groups
    last = -(-(bin_ + 1) * keys // groups)
    key = torch.arange(keys, device=like.device)[:, None]
    dtype = full_dtype(like.dtype)
    return ((key >= first) & (key < last)).to(dtype) / (last - first).to(dtype)


@functools.lru_cache(maxsize=16)
def _bins(keys: int, groups: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # backward passes will read it, too
        return bins(keys, groups, torch.empty((), dtype=dtype, device="cpu"))


# ------------------------------------------------------------------------------------- the pieces, shared with tiles


def differences(f: Tensor, g: Tensor, own: Tensor | None) -> Tensor:
    """g_j - f_i as (B, H, b, N, M). The sign matters, because eps is added per channel."""
    # Channels lead: the innermost axis of a difference should be a long one.
    apart = g.mT.contiguous().unsqueeze(-2) - f.mT.contiguous().unsqueeze(-1)
    # f and g of a self loop are one node; without this their gradients are two terms of 1e8 that cancel.
    return apart if own is None else apart.masked_fill(own, 0.0)


def _weights(A: Tensor, apart: Tensor, p: Tensor, eps: float, own: Tensor | None) -> Tensor:
    squared = ((A + eps).sqrt().unsqueeze(-3) * apart + eps).square().sum(-3)
    return A * squared.clamp_min(torch.finfo(A.dtype).tiny) ** ((p - 2) / 2)


def _weights_without_eps(A: Tensor, apart: Tensor, p: Tensor, eps: float, own: Tensor | None) -> Tensor:
    squared = apart.square().sum(-3).clamp_min(apart.shape[-3] * eps**2)
    # A^(p/2) has no finite slope at A = 0, where masked pairs lie: they are taken out before the power.
    edge = A > 0
    power = torch.where(edge, A, 1.0) ** (p / 2)
    if own is not None:
        power = torch.where(own, A, power)
    return torch.where(edge, power * squared ** ((p - 2) / 2), 0.0)


def self_loops(rows: int, columns: int, offset: int | None, device: torch.device) -> Tensor:
    """(N, M) bool, True where the column is the row's own node."""
    offset = columns - rows if offset is None else offset
    if not 0 <= offset <= columns - rows:
        raise ValueError(
            f"square graph: {rows} rows cannot be columns {offset} to {offset + rows - 1} of {columns}; set offset"
        )
    return torch.arange(columns, device=device) == torch.arange(rows, device=device)[:, None] + offset


def inverse_root(x: Tensor) -> Tensor:
    """x^(-1/2), and 0 where x is not positive."""
    some = x > 0
    return torch.where(some, torch.where(some, x, 1.0).rsqrt(), 0.0)


def upcast(*values: Tensor | float) -> tuple[Tensor, ...]:
    """All in the widest dtype of the larger tensors and at least float32; numbers and tensors of at most one dimension
    come to the same device, one element as a scalar and one per head as (H, 1, 1)."""
    tensors = [v for v in values if isinstance(v, Tensor) and v.ndim > 1]
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    device = tensors[0].device
    return tuple(v.to(dtype) if isinstance(v, Tensor) and v.ndim > 1 else _per_head(v, dtype, device) for v in values)


def _per_head(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = torch.as_tensor(value, dtype=dtype, device=device)
    return value.reshape(()) if value.numel() == 1 else value.reshape(-1, 1, 1)


def check_shapes(A: Tensor, f: Tensor, g: Tensor) -> None:
    """Refuse nodes that do not fit the map."""
    lead, (rows, columns) = A.shape[:-2], A.shape[-2:]
    if f.shape[:-1] != (*lead, rows) or g.shape[:-1] != (*lead, columns) or f.shape[-1] != g.shape[-1]:
        raise ValueError(
            f"attention {tuple(A.shape)} needs query nodes (..., {rows}, b) and value nodes (..., {columns}, b), "
            f"not {tuple(f.shape)} and {tuple(g.shape)}"
        )
