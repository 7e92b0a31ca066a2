"""The edges of one tile of a p-Laplacian graph: their weights, and what a gradient gives to nodes, p and scores."""

# B batch, H heads, N query tokens, M key tokens, G pooled key tokens, d width of a head, b channels of a node
# n x m one tile of N x M; D_ij = g_j - f_i; h_ij = dw_ij w_ij

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_ds.ops.p_laplacian import bins, inverse_root, upcast
from mmpeft_ds.ops.score_tiles import ScoreTiles


class Options(NamedTuple):
    """Arguments of `p_laplacian_attention` that are no tensors."""

    graph: str
    exact: bool
    self_term: bool
    groups: int | None
    causal: bool
    offset: int
    scaling: float
    eps: float
    tile: tuple[int, int] | None


class Nodes:
    """The nodes of one call and what weighs their edges.

    Args:
        f, g: nodes in the dtype of the computation; `g_T` holds the value nodes channel first, (B, H, b, M).
        p, mu: () or (H, 1, 1).
    """

    def __init__(self, f: Tensor, g: Tensor, p: Tensor, mu: Tensor, options: Options):
        self.f, self.g_T = f.contiguous(), g.mT.contiguous()
        self.p, self.c, self.options = p, 2 * mu / p, options
        self.square = options.graph == "square"
        self.least = g.shape[-1] * options.eps**2  # n_ij^2 of a self loop


class Job(Nodes):
    """Inputs of one call in the dtype of the computation, and their tiles.

    Args:
        q, k, f, g, p, mu, mask, options: as given to `p_laplacian_attention`.
        degree: column sums of the published graph, (B, H, M, 1), where they are known from the forward pass.
    """

    def __init__(self, q, k, f, g, p, mu, mask, options: Options, degree: Tensor | None = None):
        q, k, f, g = (x.contiguous() for x in upcast(q, k, f, g))
        self.tiles = ScoreTiles(
            q, k, mask, scaling=options.scaling, causal=options.causal, offset=options.offset, tile=options.tile
        )
        self.degree = degree
        if options.graph == "published":
            self.degree = _column_sums(self.tiles) if degree is None else degree
            g = g * inverse_root(self.degree)
        super().__init__(f, g, p, mu, options)
        self.bins = bins(k.shape[-2], options.groups, k) if options.graph == "pooled" else None

    def own(self, tile: Tensor, rows: slice, columns: slice) -> Tensor | None:
        """The self loops in a tile as a view, or None where the graph has none."""
        return tile.diagonal(self._shift(rows, columns), -2, -1) if self.square else None

    def own_rows(self, rows: slice, columns: slice) -> slice:
        """The rows of a tile that the view of `own` speaks of."""
        first = max(0, -self._shift(rows, columns))
        return slice(first, max(first, min(rows.stop - rows.start, columns.stop - rows.start - self.options.offset)))

    def _shift(self, rows: slice, columns: slice) -> int:
        return rows.start + self.options.offset - columns.start


class Edges(NamedTuple):
    """One tile, each (B, H, n, m)."""

    weight: Tensor  # w_ij
    norm: Tensor  # n_ij^2
    log_norm: Tensor
    squared: Tensor  # |D_ij|^2
    total: Tensor | None  # sum of the channels of D_ij; with eps only
    root: Tensor | None  # sqrt(A_ij + eps); with eps only


def edges(job: Job, A: Tensor, log_A: Tensor | None, rows: slice, columns: slice) -> Edges:
    """Weights of a tile from its probabilities; `log_A`, finite, is read without eps only."""
    squared, total = distances(job, rows, columns)
    power = job.p / 2 - 1
    if not job.options.exact:
        norm = squared.clamp_min(job.least)
        log_norm = norm.log()
        weight = log_A * (job.p / 2)
        if (own := job.own(weight, rows, columns)) is not None:
            own.copy_(job.own(log_A, rows, columns))
        weight.add_(log_norm * power).exp_()
        return Edges(weight, norm, log_norm, squared, None, None)
    root = (A + job.options.eps).sqrt_()
    norm = (root * squared).add_(total, alpha=2 * job.options.eps).mul_(root).add_(job.least)
    log_norm = norm.clamp_min_(torch.finfo(norm.dtype).tiny).log()
    weight = (log_norm * power).exp_().mul_(A)
    return Edges(weight, norm, log_norm, squared, total, root)


def distances(job: Job, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
    """|D_ij|^2 and, with eps, the sum of D_ij over channels; 0 for self loops.

    From differences, not from f.f + g.g - 2 f.g: a power below 0 would blow up the rounding of close nodes.
    """
    f, g_T = job.f[..., rows, :], job.g_T[..., columns]
    apart = g_T[..., :1, :] - f[..., :1]
    squared, total = apart * apart, apart.clone() if job.options.exact else None
    for c in range(1, f.shape[-1]):
        torch.sub(g_T[..., c : c + 1, :], f[..., c : c + 1], out=apart)
        squared.addcmul_(apart, apart)
        if total is not None:
            total += apart
    for tile in (squared, total):
        if tile is not None and (own := job.own(tile, rows, columns)) is not None:
            own.zero_()
    return squared, total


class Gradients:
    """Inputs of the backward pass per row, and the sums over tiles.

    On a square graph everything is seen from the row's own node: U is f + V, dw_ij = alpha_i dU_i . (D_ij - V_i). The
    self loop may hold nearly all of a row, and its dw is then exact instead of the rounding of two equal terms.

    Args:
        nodes: of the call.
        dU: gradient of U, (B, H, N, b), in the dtype of the computation.
        V: U, less f on a square graph.
        alpha: 1 / (sum_j w_ij + c), (B, H, N, 1).
        lse: log-sum-exp of the scores in two parts, (B, H, N, 2).
        own: weights of the self loops, (B, H, N, 1); of a pooled graph the pooled map, (B, H, N, G).
    """

    def __init__(self, nodes: Nodes, dU: Tensor, V: Tensor, alpha: Tensor, lse: Tensor, own: Tensor):
        self.alpha, self.lse, self.own = alpha, lse, own
        self.alpha_dU = alpha * dU
        dU_V, dU_f = (dU * V).sum(-1, keepdim=True), (dU * nodes.f).sum(-1, keepdim=True)
        level = dU_V + dU_f if nodes.square else dU_V
        self.alpha_level = alpha * level
        # dU . (U - f) where c f is part of U, and dU . U where it is not; sum_j h_ij is alpha c times this.
        surplus = level - (dU_f if nodes.options.self_term else 0.0)
        if nodes.square and nodes.options.self_term:
            surplus = dU_V
        self.h_sum = alpha * nodes.c * surplus
        self.dc = -(alpha * surplus).sum_to_size(nodes.c.shape)
        self.own_dw = -alpha * dU_V
        self.df = nodes.c * self.alpha_dU if nodes.options.self_term else torch.zeros_like(nodes.f)
        self.dg_T = torch.zeros_like(nodes.g_T)
        # Below p = 2 a self loop is heavy and its ln n far from all others: what lies above it is added up for dp, and
        # it enters with the sum of all h, where the heavy terms have cancelled.
        p = nodes.p
        self.log_least = torch.where(p < 2, math.log(nodes.least), 0.0) if nodes.square else torch.zeros_like(p)
        self.dp = self.h_sum.sum_to_size(p.shape) * self.log_least / 2


def closed_sum(nodes: Nodes, grads: Gradients, rows: slice) -> Tensor:
    """E_i without eps: p/2 sum_j h_ij, in which the self loop counts 1 in place of p/2."""
    E = nodes.p / 2 * grads.h_sum[..., rows, :]
    if nodes.square:
        E += (1 - nodes.p / 2) * grads.own_dw[..., rows, :] * grads.own[..., rows, :]
    return E


def exponent_and_pull(grads: Gradients, p: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of p and mu: c = 2 mu / p stands beside p's own place in the weights."""
    dp = grads.dp - (2 * mu * grads.dc / p**2).sum_to_size(p.shape)
    return dp, (2 * grads.dc / p).sum_to_size(mu.shape)


def edges_backward(job: Job, grads: Gradients, A: Tensor, log_A: Tensor, rows: slice, columns: slice) -> Tensor:
    """Add what a tile gives to df, dg and dp; return A_ij dA_ij. Uses up `log_A` where the edges are without eps."""
    p, eps = job.p, job.options.eps
    g_T, alpha_dU = job.g_T[..., columns], grads.alpha_dU[..., rows, :]
    tile = edges(job, A, log_A, rows, columns)
    h = (alpha_dU @ g_T).sub_(grads.alpha_level[..., rows, :])
    if (own := job.own(h, rows, columns)) is not None:
        own.copy_(grads.own_dw[..., rows, :][..., job.own_rows(rows, columns), 0])
    h *= tile.weight
    slope = (h * (p - 2)).div_(tile.norm)
    log_n = tile.log_norm
    if job.square:
        job.own(slope, rows, columns).zero_()
        log_n -= grads.log_least
    if job.options.exact:
        A_dA = (tile.total / tile.root).mul_(eps).add_(tile.squared).mul_(A).mul_(slope).mul_(0.5).add_(h)
        slope *= tile.root
        per_channel = slope * eps
        grads.df[..., rows, :] -= per_channel.sum(-1, keepdim=True)
        grads.dg_T[..., columns] += per_channel.sum(-2, keepdim=True)
        slope *= tile.root
    else:
        # A distance that counts as the least one does not move.
        slope.masked_fill_(tile.squared < job.least, 0.0)
        A_dA = h * (p / 2)
        if job.square:
            job.own(A_dA, rows, columns).copy_(own)
            job.own(log_A, rows, columns).zero_()
        log_n += log_A
    grads.dp += log_n.mul_(h).sum_to_size(p.shape) / 2
    grads.dg_T[..., columns] += alpha_dU.mT @ tile.weight
    _differences_backward(slope, job.f[..., rows, :], g_T, grads.df[..., rows, :], grads.dg_T[..., columns])
    return A_dA


def _differences_backward(slope: Tensor, f: Tensor, g_T: Tensor, df: Tensor, dg_T: Tensor) -> None:
    """Add sum_i slope_ij D_ij to dg and take sum_j slope_ij D_ij from df.

    Again from differences: slope goes with |D|^-2 and more, too large a factor for g_j and f_i apart.
    """
    apart = torch.empty_like(slope)
    for c in range(f.shape[-1]):
        torch.sub(g_T[..., c : c + 1, :], f[..., c : c + 1], out=apart)
        apart *= slope
        df[..., c] -= apart.sum(-1)
        dg_T[..., c, :] += apart.sum(-2)


def _column_sums(tiles: ScoreTiles) -> Tensor:
    """sum_i A_ij, (B, H, M, 1)."""
    total = tiles.k.new_zeros((*tiles.k.shape[:-1], 1))
    for rows in tiles.rows():
        parts, peaks, _ = tiles.softmax_parts(rows)
        for columns, tile in parts:
            total[..., columns, 0] += tile.div_(peaks).sum(-2)
    return total
