"""Sweeps over the keys of one block of rows, forward and backward."""

# B batch, H heads, G pooled key tokens, b channels of a node; n rows of a block, n x m one tile
# L log-sum-exp of the scores of a row; w, D, h as in p_laplacian_edges

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_ds.ops.p_laplacian import inverse_root
from mmpeft_ds.ops.p_laplacian_edges import Gradients, Job, closed_sum, distances, edges, edges_backward
from mmpeft_ds.ops.score_tiles import finite


class Block(NamedTuple):
    """Sums over the keys for one block of rows."""

    total: Tensor  # sum_j w_ij without the self loop, (B, H, n, 1)
    numerator: Tensor  # sum_j w_ij g_j without the self loop, (B, H, n, b)
    lse: Tensor  # (B, H, n, 2), row maximum and log of the sum, 0 where a row sees nothing
    own: Tensor | float  # weight of the self loop, (B, H, n, 1)
    pooled: Tensor | None = None  # mean probability of each bin, (B, H, n, G)


def sweep(job: Job, rows: slice) -> Block:
    """The sums of one block of rows."""
    if job.options.graph == "pooled":
        return _pooled_sweep(job, rows)
    return (_two_sweeps if job.options.exact else _one_sweep)(job, rows)


def _two_sweeps(job: Job, rows: slice) -> Block:
    """With eps: the weights need probabilities, so the softmax of the rows comes first."""
    tiles, peaks, lse = job.tiles.softmax_parts(rows)
    total, loop = torch.zeros_like(peaks), torch.zeros_like(peaks)
    numerator = torch.zeros_like(job.f[..., rows, :])
    for columns, tile in tiles:
        weight = edges(job, tile.div_(peaks), None, rows, columns).weight
        if (own := job.own(weight, rows, columns)) is not None:
            loop[..., job.own_rows(rows, columns), 0] = own
            own.zero_()
        total += weight.sum(-1, keepdim=True)
        numerator += weight @ job.g_T[..., columns].mT
    return Block(total, numerator, lse, loop)


def _one_sweep(job: Job, rows: slice) -> Block:
    """Without eps: running sums are rescaled whenever the row maximum rises. A self loop goes with the first power of
    its probability, so it waits until the end, when the normaliser is known."""
    half = job.p / 2
    peak = job.tiles.floor(rows)
    loop = peak.clone()
    normaliser, total = torch.zeros_like(peak), torch.zeros_like(peak)
    numerator = torch.zeros_like(job.f[..., rows, :])
    for columns in job.tiles.columns(rows):
        tile = job.tiles.scores(rows, columns)
        if (own := job.own(tile, rows, columns)) is not None:
            loop[..., job.own_rows(rows, columns), 0] = own
        raised = torch.maximum(peak, tile.amax(-1, keepdim=True))
        fade = (peak - finite(raised)).exp_()
        peak = raised
        tile -= finite(peak)
        normaliser = normaliser * fade + tile.exp().sum(-1, keepdim=True)
        squared, _ = distances(job, rows, columns)
        weight = tile.mul_(half).add_(squared.clamp_min_(job.least).log_().mul_(half - 1)).exp_()
        if own is not None:
            own.zero_()
        fade = fade**half
        total = total * fade + weight.sum(-1, keepdim=True)
        numerator = numerator * fade + weight @ job.g_T[..., columns].mT
    normaliser = torch.where(normaliser > 0, normaliser, 1.0)
    lse, scale = torch.cat([finite(peak), normaliser.log()], -1), normaliser**-half
    own_weight = (loop - finite(peak)).exp() / normaliser * job.least ** (half - 1)
    return Block(total * scale, numerator * scale, lse, own_weight)


def _pooled_sweep(job: Job, rows: slice) -> Block:
    """The mean probability of each bin, then the N x G formula on one block of rows."""
    peak = job.tiles.floor(rows)
    normaliser = torch.zeros_like(peak)
    pooled = peak.new_zeros((*peak.shape[:-1], job.options.groups))
    for columns in job.tiles.columns(rows):
        tile = job.tiles.scores(rows, columns)
        raised = torch.maximum(peak, tile.amax(-1, keepdim=True))
        fade = (peak - finite(raised)).exp_()
        peak = raised
        tile = tile.sub_(finite(peak)).exp_()
        normaliser = normaliser * fade + tile.sum(-1, keepdim=True)
        pooled = pooled * fade + tile @ job.bins[columns]
    normaliser = torch.where(normaliser > 0, normaliser, 1.0)
    pooled /= normaliser
    weight = edges(job, pooled, _log(pooled), rows, slice(0, job.options.groups)).weight
    lse = torch.cat([finite(peak), normaliser.log()], -1)
    return Block(weight.sum(-1, keepdim=True), weight @ job.g_T.mT, lse, 0.0, pooled)


def sweep_backward(job: Job, grads: Gradients, rows: slice, scores: bool) -> None:
    """Add what one block of rows gives to all gradients; to those of q and k only where `scores`.

    dS_ij = A_ij (dA_ij - E_i) with E_i = sum_k A_ik dA_ik. Without eps it is known beforehand; with eps it is complete
    after all tiles of the row, and until then the tiles of this block of rows are held.
    """
    if job.options.graph == "pooled":
        return _pooled_backward(job, grads, rows, scores)
    lse = grads.lse[..., rows, :]
    E = torch.zeros_like(lse[..., :1]) if job.options.exact else closed_sum(job, grads, rows)
    held = []
    for columns in job.tiles.columns(rows):
        log_A = job.tiles.log_probabilities(rows, columns, lse)
        A = log_A.exp()
        A_dA = edges_backward(job, grads, A, log_A, rows, columns)
        if scores and job.options.exact:
            E += A_dA.sum(-1, keepdim=True)
            held.append((columns, A, A_dA))
        elif scores:
            job.tiles.spread(A_dA.sub_(A.mul_(E)), rows, columns)
    for columns, A, A_dA in held:
        job.tiles.spread(A_dA.sub_(A.mul_(E)), rows, columns)
    return None


def _pooled_backward(job: Job, grads: Gradients, rows: slice, scores: bool) -> None:
    """The N x G formula on a block of rows, then its gradient through the bins to every key."""
    pooled = grads.own[..., rows, :]
    A_dA = edges_backward(job, grads, pooled, _log(pooled), rows, slice(0, job.options.groups))
    if not scores:
        return
    # A bin without probability has keys without probability, whose scores get nothing.
    dA = torch.where(pooled > 0, A_dA / torch.where(pooled > 0, pooled, 1.0), 0.0)
    E = (dA * pooled).sum(-1, keepdim=True)
    for columns in job.tiles.columns(rows):
        A = job.tiles.log_probabilities(rows, columns, grads.lse[..., rows, :]).exp_()
        job.tiles.spread((dA @ job.bins[columns].mT).sub_(E).mul_(A), rows, columns)


def degree_backward(job: Job, grads: Gradients, scores: bool) -> Tensor:
    """Gradient of the undivided value nodes of a published graph; through the column sums once more to the scores."""
    dg, root = grads.dg_T.mT, inverse_root(job.degree)
    if scores:
        d_degree = (-0.5 * (job.g_T.mT * dg).sum(-1, keepdim=True) * root**2).mT
        for rows in job.tiles.rows():
            lse, held = grads.lse[..., rows, :], []
            E = torch.zeros_like(lse[..., :1])
            for columns in job.tiles.columns(rows):
                A = job.tiles.log_probabilities(rows, columns, lse).exp_()
                E += (A * d_degree[..., columns]).sum(-1, keepdim=True)
                held.append((columns, A))
            for columns, A in held:
                job.tiles.spread(A.mul_(d_degree[..., columns] - E), rows, columns)
    return dg * root


def _log(A: Tensor) -> Tensor:
    """ln A, finite: -1e6 for 0, whose exp is 0."""
    return A.log().clamp_min_(-1e6)
