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
    log_probabilities,
    mask_of,
    seen_columns,
)
from mmpeft_ds.ops.p_laplacian_triton.tiles import (
    channel_sums,
    edge_gradients,
    log_of,
    product,
    put_columns,
    put_rows,
    rows_of,
)


@triton.jit
def edge_rows(
    q, k, mask, lse, pooled, f, g, p_of, log_least_of, alpha_dU, level, own_dw, E, df, dp, dq, d_pooled,
    N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column, least, eps,
    D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SQUARE: tl.constexpr, EXACT: tl.constexpr, POOLED: tl.constexpr,
    NODES: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """What the edges of a block of rows give to the rows.

    With NODES: -df (heads, N, B) of the differences, dp (heads, blocks) half the sum of h ln n^2, and, where E is not
    known beforehand (EXACT or POOLED), E (heads, N); with POOLED also d_pooled (heads, N, M), the gradient of the map.
    With SCORES: dq (heads, N, D) from E.
    """
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * n
    rows = start + tl.arange(0, n)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    p = tl.load(p_of + head % H)
    log_least = tl.load(log_least_of + head % H)
    f += head * B * N
    g += head * B * M
    pulls = rows_of(alpha_dU + head * N * B, rows, N, B, BB)
    row_level = tl.load(level + head * N + rows, mask=rows < N, other=0.0)
    loop_dw = tl.load(own_dw + head * N + rows, mask=rows < N, other=0.0)
    if POOLED:
        q_rows = tl.zeros((n, BD), tl.float32)
    else:
        q_rows = rows_of(q + head * N * D, rows, N, D, BD)
    if SCORES:
        known = tl.load(E + head * N + rows, mask=rows < N, other=0.0)
        to_q = tl.zeros((n, BD), tl.float32)
    if NODES:
        found = tl.zeros((n,), tl.float32)
        powers = tl.zeros((n,), tl.float32)
        moved = tl.zeros((n, BB), tl.float32)
    for at in range(0, seen_columns(start, n, M, offset, CAUSAL), m):
        columns = at + tl.arange(0, m)
        if POOLED:
            inside = (rows[:, None] < N) & (columns[None, :] < M)
            at_map = (head * N + rows[:, None]) * M + columns[None, :]
            A = tl.load(pooled + at_map, mask=inside, other=0.0)
            log_A = log_of(A)
        else:
            keys = rows_of(k + head * M * D, columns, M, D, BD)
            log_A = log_probabilities(
                q_rows, keys, mask, lse + head * N * 2, rows, columns, N, M, offset, scaling, mask_row, mask_column,
                CAUSAL, MASK,
            )  # fmt: skip
        _, A_dA, h_log_n, slope, per_channel = edge_gradients(
            log_A, pulls, row_level, loop_dw, f, g, rows, columns, N, M, offset, p, least, log_least, eps,
            B, BB, SQUARE, EXACT,
        )  # fmt: skip
        if NODES:
            found += tl.sum(A_dA, 1)
            powers += tl.sum(h_log_n, 1)
            moved += channel_sums(slope, f, g, rows, columns, N, M, B, BB, n, 1)
            moved += tl.sum(per_channel, 1)[:, None]
            if POOLED:
                # A bin without probability has keys without probability, whose scores get nothing.
                tl.store(d_pooled + at_map, tl.where(A > 0, A_dA / tl.where(A > 0, A, 1.0), 0.0), mask=inside)
        if SCORES:
            ds = A_dA - tl.exp(log_A) * known[:, None]
            to_q += product(ds, keys.to(tl.float32))
    if NODES:
        put_rows(df + head * N * B, moved, rows, N, B, BB)
        tl.store(dp + head * tl.num_programs(0) + tl.program_id(0), 0.5 * tl.sum(powers, 0))
        if EXACT or POOLED:
            tl.store(E + head * N + rows, found, mask=rows < N)
    if SCORES:
        put_rows(dq + head * N * D, to_q * scaling, rows, N, D, BD)


@triton.jit
def edge_columns(
    q, k, mask, lse, pooled, f, g, p_of, log_least_of, alpha_dU, level, own_dw, E, dg, dk,
    N, M, H, offset, scaling, mask_batch, mask_head, mask_row, mask_column, least, eps,
    D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SQUARE: tl.constexpr, EXACT: tl.constexpr, POOLED: tl.constexpr,
    SCORES: tl.constexpr,
):  # fmt: skip
    """What the edges of a block of columns give to the columns: dg (heads, B, M), and with SCORES dk (heads, M, D)."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * m
    columns = start + tl.arange(0, m)
    mask = mask_of(mask, head, H, mask_batch, mask_head)
    p = tl.load(p_of + head % H)
    log_least = tl.load(log_least_of + head % H)
    f += head * B * N
    g += head * B * M
    if not POOLED:
        keys = rows_of(k + head * M * D, columns, M, D, BD)
    if SCORES:
        to_k = tl.zeros((m, BD), tl.float32)
    moved = tl.zeros((m, BB), tl.float32)
    for at in range(first_row(start, n, offset, CAUSAL), N, n):
        rows = at + tl.arange(0, n)
        pulls = rows_of(alpha_dU + head * N * B, rows, N, B, BB)
        row_level = tl.load(level + head * N + rows, mask=rows < N, other=0.0)
        loop_dw = tl.load(own_dw + head * N + rows, mask=rows < N, other=0.0)
        if POOLED:
            inside = (rows[:, None] < N) & (columns[None, :] < M)
            at_map = (head * N + rows[:, None]) * M + columns[None, :]
            log_A = log_of(tl.load(pooled + at_map, mask=inside, other=0.0))
        else:
            q_rows = rows_of(q + head * N * D, rows, N, D, BD)
            log_A = log_probabilities(
                q_rows, keys, mask, lse + head * N * 2, rows, columns, N, M, offset, scaling, mask_row, mask_column,
                CAUSAL, MASK,
            )  # fmt: skip
        weight, A_dA, _, slope, per_channel = edge_gradients(
            log_A, pulls, row_level, loop_dw, f, g, rows, columns, N, M, offset, p, least, log_least, eps,
            B, BB, SQUARE, EXACT,
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
    seen = seen_columns(start, n, M, offset, CAUSAL)
    if R == 0:
        right += head * M
        known = tl.zeros((n,), tl.float32)
        for at in range(0, seen, m):
            columns = at + tl.arange(0, m)
            keys = rows_of(k + head * M * D, columns, M, D, BD)
            log_A = log_probabilities(
                q_rows, keys, mask, lse + head * N * 2, rows, columns, N, M, offset, scaling, mask_row, mask_column,
                CAUSAL, MASK,
            )  # fmt: skip
            known += tl.sum(tl.exp(log_A) * map_gradient(left, right, rows, columns, N, M, R, BR), 1)
        tl.store(E + head * N + rows, known, mask=rows < N)
    else:
        known = tl.load(E + head * N + rows, mask=rows < N, other=0.0)
    to_q = tl.zeros((n, BD), tl.float32)
    for at in range(0, seen, m):
        columns = at + tl.arange(0, m)
        keys = rows_of(k + head * M * D, columns, M, D, BD)
        log_A = log_probabilities(
            q_rows, keys, mask, lse + head * N * 2, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            CAUSAL, MASK,
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
        q_rows = rows_of(q + head * N * D, rows, N, D, BD)
        log_A = log_probabilities(
            q_rows, keys, mask, lse + head * N * 2, rows, columns, N, M, offset, scaling, mask_row, mask_column,
            CAUSAL, MASK,
        )  # fmt: skip
        known = tl.load(E + head * N + rows, mask=rows < N, other=0.0)
        ds = tl.exp(log_A) * (map_gradient(left, right, rows, columns, N, M, R, BR) - known[:, None])
        to_k += product(tl.trans(ds), q_rows.to(tl.float32))
    put_rows(dk + head * M * D, to_k * scaling, columns, M, D, BD)
