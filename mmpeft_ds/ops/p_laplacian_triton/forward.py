"""Triton kernels of the forward pass: softmax normalisers, column sums, pooled maps, and the messages themselves.

A program takes one block of rows (or columns) of one head and runs over the other axis.
"""

# N query tokens, M key tokens, G pooled key tokens, d width of a head, b channels of a node; n x m one tile

from __future__ import annotations

import triton
import triton.language as tl

from mmpeft_ds.ops.p_laplacian_triton.tiles import (
    columns_of,
    edges,
    log_of,
    product,
    put_rows,
    rows_of,
    scores,
)


@triton.jit
def seen_columns(start, n: tl.constexpr, M, offset, CAUSAL: tl.constexpr):
    """Number of columns that some row of a block attends to."""
    seen = M
    if CAUSAL:
        seen = tl.maximum(0, tl.minimum(M, start + n + offset))
    return seen


@triton.jit
def first_row(start, n: tl.constexpr, offset, CAUSAL: tl.constexpr):
    """Start of the first block of rows that sees some column of the block at `start`."""
    first = 0
    if CAUSAL:
        first = tl.maximum(0, start - offset) // n * n
    return first


@triton.jit
def mask_of(mask, head, H, mask_batch, mask_head):
    """Start of the mask of one head."""
    return mask + (head // H) * mask_batch + (head % H) * mask_head


@triton.jit
def row_lse(
    q, k, mask, lse, N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column,
    D: tl.constexpr, BD: tl.constexpr, n: tl.constexpr, m: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """lse (heads, N, 2): row maximum and log of the sum, apart, 0 where a row sees nothing."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * n
    rows = start + tl.arange(0, n)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    q_rows = rows_of(q + head * N * D, rows, N, D, BD)
    peak = tl.full((n,), float("-inf"), tl.float32)
    normaliser = tl.zeros((n,), tl.float32)
    for at in range(0, seen_columns(start, n, M, offset, CAUSAL), m):
        columns = at + tl.arange(0, m)
        keys = rows_of(k + head * M * D, columns, M, D, BD)
        s = scores(q_rows, keys, mask, rows, columns, N, M, offset, scaling, mask_row, mask_column, CAUSAL, MASK)
        raised = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        normaliser = normaliser * tl.exp(peak - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        peak = raised
    seen = normaliser > 0
    tl.store(lse + (head * N + rows) * 2, tl.where(seen, peak, 0.0), mask=rows < N)
    log_sum = tl.log(tl.where(seen, normaliser, 1.0))
    tl.store(lse + (head * N + rows) * 2 + 1, log_sum, mask=rows < N)


@triton.jit
def normalisers(lse, head, rows, N, POOLED: tl.constexpr):
    """(n,) row maximum and log of the sum, of `row_lse`; zeros with POOLED, where a map is read."""
    peak = tl.zeros((rows.shape[0],), tl.float32)
    log_sum = peak
    if not POOLED:
        peak = tl.load(lse + (head * N + rows) * 2, mask=rows < N, other=0.0)
        log_sum = tl.load(lse + (head * N + rows) * 2 + 1, mask=rows < N, other=0.0)
    return peak, log_sum


@triton.jit
def log_probabilities(
    q, k, mask, peak, log_sum, rows, columns, N, M, offset, scaling, mask_row, mask_column,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """(n, m) ln of the attention probabilities, finite. Beside the least float, of which masks are made, the log of
    the sum would be lost, so it is subtracted on its own."""
    s = scores(q, k, mask, rows, columns, N, M, offset, scaling, mask_row, mask_column, CAUSAL, MASK)
    return tl.maximum(s - peak[:, None] - log_sum[:, None], -1e6)


@triton.jit
def moving_tile(
    kept, moving, mask, peak, log_sum, pooled, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
    D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, POOLED: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The keys (m, BD) of a tile that a program of rows comes to, or the queries (n, BD) for a program of columns, and
    (n, m) ln of the probabilities; with POOLED these are read from the map, and `kept` is returned.

    Args:
        kept: (n, BD) queries, or (m, BD) keys, that the program keeps.
        moving: all keys (heads, M, D), or queries (heads, N, D).
        peak, log_sum: of `normalisers`.
    """
    if POOLED:
        inside = (rows[:, None] < N) & (columns[None, :] < M)
        log_A = log_of(tl.load(pooled + map_place(head, rows, columns, N, M), mask=inside, other=0.0))
        came = kept
    else:
        if BY_COLUMNS:
            came = rows_of(moving + head * N * D, rows, N, D, BD)
            q, k = came, kept
        else:
            came = rows_of(moving + head * M * D, columns, M, D, BD)
            q, k = kept, came
        log_A = log_probabilities(
            q, k, mask, peak, log_sum, rows, columns, N, M, offset, scaling, mask_row, mask_column, CAUSAL, MASK
        )
    return came, log_A


@triton.jit
def map_place(head, rows, columns, N, M):
    """Position of a tile in a map (heads, N, M)."""
    return (head * N + rows[:, None]) * M + columns[None, :]


@triton.jit
def column_sums(
    q, k, mask, lse, degree, N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column,
    D: tl.constexpr, BD: tl.constexpr, n: tl.constexpr, m: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """degree (heads, M): what all rows give to a column."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * m
    columns = start + tl.arange(0, m)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    keys = rows_of(k + head * M * D, columns, M, D, BD)
    total = tl.zeros((m,), tl.float32)
    for at in range(first_row(start, n, offset, CAUSAL), N, n):
        rows = at + tl.arange(0, n)
        peak, log_sum = normalisers(lse, head, rows, N, False)
        _, log_A = moving_tile(
            keys, q, mask, peak, log_sum, lse, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            D, BD, CAUSAL, MASK, False, True,
        )  # fmt: skip
        total += tl.sum(tl.exp(log_A), 0)
    tl.store(degree + head * M + columns, total, mask=columns < M)


@triton.jit
def pooled_map(
    q, k, mask, lse, bins, pooled, N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """pooled (heads, N, G): mean probability of each bin of keys; `bins` (M, G) averages."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * n
    rows = start + tl.arange(0, n)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    q_rows = rows_of(q + head * N * D, rows, N, D, BD)
    peak, log_sum = normalisers(lse, head, rows, N, False)
    out = tl.zeros((n, BG), tl.float32)
    for at in range(0, seen_columns(start, n, M, offset, CAUSAL), m):
        columns = at + tl.arange(0, m)
        _, log_A = moving_tile(
            q_rows, k, mask, peak, log_sum, lse, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            D, BD, CAUSAL, MASK, False, False,
        )  # fmt: skip
        out += product(tl.exp(log_A), rows_of(bins, columns, M, G, BG))
    put_rows(pooled + head * N * G, out, rows, N, G, BG)


@triton.jit
def messages(
    q, k, mask, lse, pooled, f, g, p_of, c_of, V, alpha, own_weight,
    N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column, least, eps,
    D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SQUARE: tl.constexpr, EXACT: tl.constexpr, POOLED: tl.constexpr,
    SELF_TERM: tl.constexpr,
):  # fmt: skip
    """V (heads, N, B): U, less f on a square graph; alpha and the weight of the self loop, (heads, N).

    Args:
        lse: of `row_lse`; with POOLED the map is read instead, `pooled` (heads, N, M), and M is the number of bins.
        f, g: nodes, channel first, (heads, B, N) and (heads, B, M).
        p_of, c_of: exponent and 2 mu / p of each head, (H,).
    """
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * n
    rows = start + tl.arange(0, n)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    p = tl.load(p_of + head % H)
    c = tl.load(c_of + head % H)
    f += head * B * N
    g += head * B * M
    if POOLED:
        q_rows = tl.zeros((n, BD), tl.float32)
    else:
        q_rows = rows_of(q + head * N * D, rows, N, D, BD)
    peak, log_sum = normalisers(lse, head, rows, N, POOLED)
    total = tl.zeros((n,), tl.float32)
    loop = tl.zeros((n,), tl.float32)
    numerator = tl.zeros((n, BB), tl.float32)
    for at in range(0, seen_columns(start, n, M, offset, CAUSAL), m):
        columns = at + tl.arange(0, m)
        _, log_A = moving_tile(
            q_rows, k, mask, peak, log_sum, pooled, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            D, BD, CAUSAL, MASK, POOLED, False,
        )  # fmt: skip
        weight, _, _, _, _, _ = edges(log_A, f, g, rows, columns, N, M, offset, p, least, eps, B, SQUARE, EXACT)
        if SQUARE:
            own = columns[None, :] == rows[:, None] + offset
            loop += tl.sum(tl.where(own, weight, 0.0), 1)
            weight = tl.where(own, 0.0, weight)
        total += tl.sum(weight, 1)
        numerator += product(weight, tl.trans(columns_of(g, columns, M, B, BB)))
    scale = 1.0 / (total + loop + c)
    pull = tl.zeros_like(total)
    if SELF_TERM:
        pull += c
    if SQUARE:
        # Seen from the row's own node, where U - f is a small part of U.
        pull -= total + c
    moved = (numerator + pull[:, None] * tl.trans(columns_of(f, rows, N, B, BB))) * scale[:, None]
    put_rows(V + head * N * B, moved, rows, N, B, BB)
    tl.store(alpha + head * N + rows, scale, mask=rows < N)
    tl.store(own_weight + head * N + rows, loop, mask=rows < N)
