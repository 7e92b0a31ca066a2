"""One tile of a p-Laplacian graph inside a Triton kernel: scores, weights, and what a gradient gives to an edge.

Every function here is inlined into the kernels of `forward` and `backward`. Node tensors lie channel first, so that
one channel of a block of tokens is one contiguous load. A tile that hangs over the edge of the graph counts as masked.
"""

# N query tokens, M key tokens, d width of a head, b channels of a node (BB: padded to a power of two)
# n x m one tile; D_ij = g_j - f_i; h_ij = dw_ij w_ij

from __future__ import annotations

import triton
import triton.language as tl

# Kinds of mask, as the kernels know them.
NO_MASK, KEEP, KEEP_KEYS, ADDED = (tl.constexpr(i) for i in range(4))
# float32 products of tensor cores in three parts: the rounding of float32, not of TF32.
PRECISION = tl.constexpr("tf32x3")
NOTHING = tl.constexpr(-1e6)  # ln of a probability that is 0: its exp is 0
TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32


@triton.jit
def rows_of(pointer, tokens, T, D: tl.constexpr, BD: tl.constexpr):
    """(t, BD): some rows of a (T, D) matrix, zeros outside of it."""
    channels = tl.arange(0, BD)
    inside = (tokens[:, None] < T) & (channels[None, :] < D)
    return tl.load(pointer + tokens[:, None] * D + channels[None, :], mask=inside, other=0.0)


@triton.jit
def columns_of(pointer, tokens, T, B: tl.constexpr, BB: tl.constexpr):
    """(BB, t): some columns of a (B, T) matrix, zeros outside of it."""
    channels = tl.arange(0, BB)
    inside = (channels[:, None] < B) & (tokens[None, :] < T)
    return tl.load(pointer + channels[:, None] * T + tokens[None, :], mask=inside, other=0.0)


@triton.jit
def put_rows(pointer, value, tokens, T, D: tl.constexpr, BD: tl.constexpr):
    """Store (t, BD) as rows of a (T, D) matrix."""
    channels = tl.arange(0, BD)
    inside = (tokens[:, None] < T) & (channels[None, :] < D)
    tl.store(pointer + tokens[:, None] * D + channels[None, :], value, mask=inside)


@triton.jit
def put_columns(pointer, value, tokens, T, B: tl.constexpr, BB: tl.constexpr):
    """Store (BB, t) as columns of a (B, T) matrix."""
    channels = tl.arange(0, BB)
    inside = (channels[:, None] < B) & (tokens[None, :] < T)
    tl.store(pointer + channels[:, None] * T + tokens[None, :], value, mask=inside)


@triton.jit
def product(a, b):
    """a @ b in float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def scores(
    q, k, mask, rows, columns, N, M, offset, scaling, mask_row, mask_column, CAUSAL: tl.constexpr, MASK: tl.constexpr
):
    """(n, m) scaled and masked scores of (n, BD) queries on (m, BD) keys, -inf where a row does not see a column."""
    s = product(q, tl.trans(k)) * scaling
    inside = (rows[:, None] < N) & (columns[None, :] < M)
    if CAUSAL:
        inside = inside & (columns[None, :] <= rows[:, None] + offset)
    if MASK == KEEP_KEYS:
        keep = tl.load(mask + columns * mask_column, mask=columns < M, other=0)
        inside = inside & (keep != 0)[None, :]
    if MASK == KEEP:
        at = mask + rows[:, None] * mask_row + columns[None, :] * mask_column
        inside = inside & (tl.load(at, mask=inside, other=0) != 0)
    if MASK == ADDED:
        at = mask + rows[:, None] * mask_row + columns[None, :] * mask_column
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def log_of(A):
    """ln A, finite."""
    return tl.where(A > 0, tl.log(tl.where(A > 0, A, 1.0)), NOTHING)


@triton.jit
def edges(
    log_A, f, g, rows, columns, N, M, offset, p, least, eps, B: tl.constexpr, SQUARE: tl.constexpr, EXACT: tl.constexpr
):
    """Weights of a tile and what they were made of: w, n^2, ln n^2, |D|^2, sum of D, sqrt(A + eps).

    |D|^2 is summed from differences, not f.f + g.g - 2 f.g: a power below 0 would blow up the rounding of close nodes.
    The last two are only of use with eps.
    """
    squared = tl.zeros_like(log_A)
    total = tl.zeros_like(log_A)
    for c in range(B):
        g_c = tl.load(g + c * M + columns, mask=columns < M, other=0.0)
        f_c = tl.load(f + c * N + rows, mask=rows < N, other=0.0)
        apart = g_c[None, :] - f_c[:, None]
        squared += apart * apart
        if EXACT:
            total += apart
    own = columns[None, :] == rows[:, None] + offset
    if SQUARE:
        squared = tl.where(own, 0.0, squared)
        total = tl.where(own, 0.0, total)
    power = p * 0.5 - 1.0
    if EXACT:
        A = tl.exp(log_A)
        root = tl.sqrt(A + eps)
        norm = tl.maximum((root * squared + 2.0 * eps * total) * root + least, TINY)
        log_norm = tl.log(norm)
        weight = A * tl.exp(log_norm * power)
    else:
        root = total
        norm = tl.maximum(squared, least)
        log_norm = tl.log(norm)
        log_weight = log_A * (p * 0.5)
        if SQUARE:
            log_weight = tl.where(own, log_A, log_weight)
        weight = tl.exp(log_weight + log_norm * power)
    return weight, norm, log_norm, squared, total, root


@triton.jit
def edge_gradients(
    log_A, alpha_dU, level, own_dw, values, f, g, rows, columns, N, M, offset, p, least, log_least, eps,
    B: tl.constexpr, SQUARE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's edges: w, A dA, h ln n^2, the slope of |D|^2 and the slope of sum D, each (n, m).

    Args:
        log_A: ln of the probabilities, finite.
        alpha_dU: (n, BB); `level` (n,) what all dw of a row have in common; `own_dw` (n,) that of the self loop.
        values: (BB, m) value nodes of the columns.
        f, g: pointers to (B, N) and (B, M).
    """
    weight, norm, log_norm, squared, total, root = edges(
        log_A, f, g, rows, columns, N, M, offset, p, least, eps, B, SQUARE, EXACT
    )
    own = columns[None, :] == rows[:, None] + offset
    h = product(alpha_dU, values) - level[:, None]
    if SQUARE:
        h = tl.where(own, own_dw[:, None], h)
    h *= weight
    slope = h * (p - 2.0) / norm
    log_n = log_norm
    if SQUARE:
        slope = tl.where(own, 0.0, slope)
        log_n -= log_least
    if EXACT:
        A_dA = ((total / root) * eps + squared) * tl.exp(log_A) * slope * 0.5 + h
        per_channel = slope * root * eps
        slope *= root * root
    else:
        # A distance that counts as the least one does not move.
        slope = tl.where(squared < least, 0.0, slope)
        A_dA = h * (p * 0.5)
        log_edge = log_A
        if SQUARE:
            A_dA = tl.where(own, h, A_dA)
            log_edge = tl.where(own, 0.0, log_A)
        log_n += log_edge
        per_channel = tl.zeros_like(slope)
    return weight, A_dA, h * log_n, slope, per_channel


@triton.jit
def channel_sums(
    slope, f, g, rows, columns, N, M, B: tl.constexpr, BB: tl.constexpr, TOKENS: tl.constexpr, AXIS: tl.constexpr
):
    """(TOKENS, BB): sum over `AXIS` of slope_ij D_ij, channel by channel.

    From differences again: slope goes with |D|^-2 and more, too large a factor for g_j and f_i apart.
    """
    out = tl.zeros((TOKENS, BB), tl.float32)
    channels = tl.arange(0, BB)
    for c in range(B):
        g_c = tl.load(g + c * M + columns, mask=columns < M, other=0.0)
        f_c = tl.load(f + c * N + rows, mask=rows < N, other=0.0)
        summed = tl.sum(slope * (g_c[None, :] - f_c[:, None]), AXIS)
        out += tl.where(channels[None, :] == c, summed[:, None], 0.0)
    return out
