"""Triton kernels of the backward pass: every tile is computed again, once by rows and once by columns.

No two programs add to the same place, so the result does not depend on their order.
"""

# N query tokens, M key tokens, G pooled key tokens, d width of a head, b channels of a node; n x m one tile
# E_i = sum_k A_ik dA_ik

from __future__ import annotations

import triton
import triton.language as tl

from mmpeft_ds.ops.p_laplacian_triton.forward import (
    first_row,
    map_place,
    mask_of,
    moving_tile,
    normalisers,
    seen_columns,
)
from mmpeft_ds.ops.p_laplacian_triton.tiles import (
    channel_sums,
    columns_of,
    edge_gradients,
    product,
    put_columns,
    put_rows,
    rows_of,
)


@triton.jit
def of_rows(alpha_dU, level, own_dw, head, rows, N, B: tl.constexpr, BB: tl.constexpr):
    """Parts of the edges' gradients that depend on the row: alpha dU (n, BB), the common part of all dw of a row (n,),
    and dw of the self loop (n,)."""
    inside = rows < N
    pulls = rows_of(alpha_dU + head * N * B, rows, N, B, BB)
    row_level = tl.load(level + head * N + rows, mask=inside, other=0.0)
    return pulls, row_level, tl.load(own_dw + head * N + rows, mask=inside, other=0.0)


@triton.jit
def edge_rows(
    q, k, mask, lse, pooled, f, g, p_of, log_least_of, alpha_dU, level, own_dw, E, df, dp, dq, d_pooled,
    N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column, least, eps,
    D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SQUARE: tl.constexpr, EXACT: tl.constexpr, POOLED: tl.constexpr,
    SCORES: tl.constexpr,
):  # fmt: skip
    """Gradients that the edges of a block of rows give to the rows.

    -df (heads, N, B) of the differences, dp (heads, blocks) half the sum of h ln n^2, and, where E is not known
    beforehand (EXACT or POOLED), E (heads, N); with POOLED also d_pooled (heads, N, M), the gradient of the map. With
    SCORES: dq (heads, N, D), the sum of (A dA - A E) times the keys. With EXACT both terms are summed apart, since E
    is known at the end of a row alone. Each edge by itself would round them no less.
    """
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * n
    rows = start + tl.arange(0, n)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    p = tl.load(p_of + head % H)
    log_least = tl.load(log_least_of + head % H)
    f += head * B * N
    g += head * B * M
    pulls, row_level, loop_dw = of_rows(alpha_dU, level, own_dw, head, rows, N, B, BB)
    if POOLED:
        q_rows = tl.zeros((n, BD), tl.float32)
    else:
        q_rows = rows_of(q + head * N * D, rows, N, D, BD)
    if SCORES:
        to_q = tl.zeros((n, BD), tl.float32)
        if EXACT:
            mean_key = tl.zeros((n, BD), tl.float32)
        else:
            known = tl.load(E + head * N + rows, mask=rows < N, other=0.0)
    peak, log_sum = normalisers(lse, head, rows, N, POOLED)
    e = tl.zeros((n,), tl.float32)
    powers = tl.zeros((n,), tl.float32)
    moved = tl.zeros((n, BB), tl.float32)
    for at in range(0, seen_columns(start, n, M, offset, CAUSAL), m):
        columns = at + tl.arange(0, m)
        keys, log_A = moving_tile(
            q_rows, k, mask, peak, log_sum, pooled, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            D, BD, CAUSAL, MASK, POOLED, False,
        )  # fmt: skip
        values = columns_of(g, columns, M, B, BB)
        _, A_dA, h_log_n, slope, per_channel = edge_gradients(
            log_A, pulls, row_level, loop_dw, values, f, g, rows, columns, N, M, offset, p, least, log_least, eps,
            B, SQUARE, EXACT,
        )  # fmt: skip
        e += tl.sum(A_dA, 1)
        powers += tl.sum(h_log_n, 1)
        moved += channel_sums(slope, f, g, rows, columns, N, M, B, BB, n, 1)
        moved += tl.sum(per_channel, 1)[:, None]
        if POOLED:
            # A bin without probability has keys without probability, whose scores get nothing.
            A = tl.exp(log_A)
            inside = (rows[:, None] < N) & (columns[None, :] < M)
            to_map = tl.where(A > 0, A_dA / tl.where(A > 0, A, 1.0), 0.0)
            tl.store(d_pooled + map_place(head, rows, columns, N, M), to_map, mask=inside)
        if SCORES:
            if EXACT:
                to_q += product(A_dA, keys.to(tl.float32))
                mean_key += product(tl.exp(log_A), keys.to(tl.float32))
            else:
                to_q += product(A_dA - tl.exp(log_A) * known[:, None], keys.to(tl.float32))
    put_rows(df + head * N * B, moved, rows, N, B, BB)
    tl.store(dp + head * tl.num_programs(0) + tl.program_id(0), 0.5 * tl.sum(powers, 0))
    if EXACT or POOLED:
        tl.store(E + head * N + rows, e, mask=rows < N)
    if SCORES:
        if EXACT:
            to_q -= e[:, None] * mean_key
        put_rows(dq + head * N * D, to_q * scaling, rows, N, D, BD)


@triton.jit
def edge_columns(
    q, k, mask, lse, pooled, f, g, p_of, log_least_of, alpha_dU, level, own_dw, E, dg, dk,
    N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column, least, eps,
    D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SQUARE: tl.constexpr, EXACT: tl.constexpr, POOLED: tl.constexpr,
    SCORES: tl.constexpr,
):  # fmt: skip
    """Gradients that the edges of a block of columns give to the columns: dg (heads, B, M), and with SCORES dk (heads,
    M, D)."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * m
    columns = start + tl.arange(0, m)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    p = tl.load(p_of + head % H)
    log_least = tl.load(log_least_of + head % H)
    f += head * B * N
    g += head * B * M
    if POOLED:
        keys = tl.zeros((m, BD), tl.float32)
    else:
        keys = rows_of(k + head * M * D, columns, M, D, BD)
    if SCORES:
        to_k = tl.zeros((m, BD), tl.float32)
    moved = tl.zeros((m, BB), tl.float32)
    values = columns_of(g, columns, M, B, BB)
    for at in range(first_row(start, n, offset, CAUSAL), N, n):
        rows = at + tl.arange(0, n)
        pulls, row_level, loop_dw = of_rows(alpha_dU, level, own_dw, head, rows, N, B, BB)
        peak, log_sum = normalisers(lse, head, rows, N, POOLED)
        q_rows, log_A = moving_tile(
            keys, q, mask, peak, log_sum, pooled, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            D, BD, CAUSAL, MASK, POOLED, True,
        )  # fmt: skip
        weight, A_dA, _, slope, per_channel = edge_gradients(
            log_A, pulls, row_level, loop_dw, values, f, g, rows, columns, N, M, offset, p, least, log_least, eps,
            B, SQUARE, EXACT,
        )  # fmt: skip
        moved += product(tl.trans(weight), pulls)
        moved += channel_sums(slope, f, g, rows, columns, N, M, B, BB, m, 0)
        moved += tl.sum(per_channel, 0)[:, None]
        if SCORES:
            known = tl.load(E + head * N + rows, mask=rows < N, other=0.0)
            ds = A_dA - tl.exp(log_A) * known[:, None]
            to_k += product(tl.trans(ds), q_rows.to(tl.float32))
    put_columns(dg + head * B * M, tl.trans(moved), columns, M, B, BB)
    if SCORES:
        put_rows(dk + head * M * D, to_k * scaling, columns, M, D, BD)


@triton.jit
def map_gradient(left, right, rows, columns, N, M, R: tl.constexpr, BR: tl.constexpr):
    """(n, m) gradient of the map: left (N, R) times right (M, R); with R = 0 `right` (M,) in every row."""
    if R == 0:
        of_column = tl.load(right + columns, mask=columns < M, other=0.0)
        out = of_column[None, :] + tl.zeros((rows.shape[0], 1), tl.float32)
    else:
        out = product(rows_of(left, rows, N, R, BR), tl.trans(rows_of(right, columns, M, R, BR)))
    return out


@triton.jit
def map_rows(
    q, k, mask, lse, left, right, E, dq, N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dq (heads, N, D) of a gradient of the attention map that has a low rank (see `map_gradient`).

    `right` belongs to one head where R = 0, and to all where not. E (heads, N) is known where R > 0, and otherwise
    found first and stored.
    """
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * n
    rows = start + tl.arange(0, n)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    q_rows = rows_of(q + head * N * D, rows, N, D, BD)
    left += head * N * R
    peak, log_sum = normalisers(lse, head, rows, N, False)
    seen = seen_columns(start, n, M, offset, CAUSAL)
    if R == 0:
        right += head * M
        known = tl.zeros((n,), tl.float32)
        for at in range(0, seen, m):
            columns = at + tl.arange(0, m)
            _, log_A = moving_tile(
                q_rows, k, mask, peak, log_sum, lse, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
                D, BD, CAUSAL, MASK, False, False,
            )  # fmt: skip
            known += tl.sum(tl.exp(log_A) * map_gradient(left, right, rows, columns, N, M, R, BR), 1)
        tl.store(E + head * N + rows, known, mask=rows < N)
    else:
        known = tl.load(E + head * N + rows, mask=rows < N, other=0.0)
    to_q = tl.zeros((n, BD), tl.float32)
    for at in range(0, seen, m):
        columns = at + tl.arange(0, m)
        keys, log_A = moving_tile(
            q_rows, k, mask, peak, log_sum, lse, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            D, BD, CAUSAL, MASK, False, False,
        )  # fmt: skip
        ds = tl.exp(log_A) * (map_gradient(left, right, rows, columns, N, M, R, BR) - known[:, None])
        to_q += product(ds, keys.to(tl.float32))
    put_rows(dq + head * N * D, to_q * scaling, rows, N, D, BD)


@triton.jit
def map_columns(
    q, k, mask, lse, left, right, E, dk, N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dk (heads, M, D) of the same gradient, with the E of `map_rows`."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * m
    columns = start + tl.arange(0, m)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    keys = rows_of(k + head * M * D, columns, M, D, BD)
    left += head * N * R
    if R == 0:
        right += head * M
    to_k = tl.zeros((m, BD), tl.float32)
    for at in range(first_row(start, n, offset, CAUSAL), N, n):
        rows = at + tl.arange(0, n)
        peak, log_sum = normalisers(lse, head, rows, N, False)
        q_rows, log_A = moving_tile(
            keys, q, mask, peak, log_sum, lse, head, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            D, BD, CAUSAL, MASK, False, True,
        )  # fmt: skip
        known = tl.load(E + head * N + rows, mask=rows < N, other=0.0)
        ds = tl.exp(log_A) * (map_gradient(left, right, rows, columns, N, M, R, BR) - known[:, None])
        to_k += product(tl.trans(ds), q_rows.to(tl.float32))
    put_rows(dk + head * M * D, to_k * scaling, columns, M, D, BD)
