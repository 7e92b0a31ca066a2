"""Mode approximation: one three-way factorisation of all weight updates of a model, and what it adds to each map."""

# R rank, K modes (weight updates) of one map, D width of the factors, c chunks of a feed-forward block (hidden = c D).
# `core` is the full (R, R, R) tensor (Tucker form) or its superdiagonal (R,) (CP form); both give the same numbers
# when the full core is zero off its superdiagonal.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mode_slices(core: Tensor, mode_RK: Tensor) -> Tensor:
    """The R x R matrices between `down` and `up`, one for each mode: G_k[i, j] = sum_r core[i, j, r] mode[r, k].

    Args:
        core: (R, R, R), contracted over its last axis, or (R,), the superdiagonal of the CP form.
        mode_RK: one column for each weight update.

    Returns:
        (K, R, R); diagonal matrices for the CP form.

    Raises:
        ValueError: if the sizes do not fit.

    Source: Aurora, NeurIPS 2023, arXiv 2305.08381 (mode approximation); the released code has the full core, the
    paper's CP form is its superdiagonal.
    """
    _check(core, mode_RK)
    if core.dim() == 1:
        return torch.diag_embed((core.unsqueeze(1) * mode_RK).T)
    return torch.einsum("ijr,rk->kij", core, mode_RK)


def mode_delta(
    x: Tensor,
    down_RD: Tensor,
    up_OR: Tensor,
    core: Tensor,
    mode_RK: Tensor,
    *,
    dropout: float = 0.0,
    drop_before_core: bool = False,
) -> Tensor:
    """Sum of K weight updates that read the same input: delta_k(x) = ((x down^T) G_k) up^T.

    The bottleneck x down^T is computed once for all K, and no D x D matrix is formed.

    Args:
        x: (..., D).
        down_RD, up_OR: the factors that all updates share.
        core, mode_RK: as in `mode_slices`.
        dropout: probability in the bottleneck, each of the K paths with its own mask; give 0 in evaluation.
        drop_before_core: drop x down^T, as in text towers, instead of (x down^T) G_k, as in vision towers.

    Returns:
        (..., K, O).

    Source: Aurora, arXiv 2305.08381, released code of the attention layers.
    """
    _check(core, mode_RK)
    rank, modes = mode_RK.shape
    z = _map(x, down_RD).unsqueeze(-2)
    if drop_before_core and dropout:
        z = F.dropout(z.expand(*z.shape[:-2], modes, rank), dropout)
    if core.dim() == 1:
        t = z * (core.unsqueeze(1) * mode_RK).T
    elif z.shape[-2] == 1:
        # One product with all slices, one below the other, is faster than K small ones.
        t = _map(z.squeeze(-2), mode_slices(core, mode_RK).mT.flatten(0, 1)).unflatten(-1, (modes, rank))
    else:
        t = torch.einsum("...ki,kij->...kj", z, mode_slices(core, mode_RK))
    if not drop_before_core and dropout:
        t = F.dropout(t, dropout)
    return _map(t, up_OR)


def widening_delta(
    x: Tensor,
    down_RD: Tensor,
    up_DR: Tensor,
    core: Tensor,
    mode_Rc: Tensor,
    *,
    dropout: float = 0.0,
    drop_before_core: bool = False,
) -> Tensor:
    """Update of the first map of a feed-forward block, D -> c D, with c modes.

    The c slices are laid out in one R x c R matrix whose column c j + k is column j of G_k, and chunk a of the output
    reads the contiguous columns a R ... a R + R - 1 of it. So every chunk mixes all slices; it is not "chunk a uses
    slice a". Published weights need this layout.

    Args:
        x: (..., D).
        mode_Rc: c modes; the rest as in `mode_delta`.

    Returns:
        (..., c D).

    Source: Aurora, arXiv 2305.08381, released code of the vision MLP.
    """
    c = mode_Rc.shape[1]
    z = _map(x, down_RD)
    if drop_before_core and dropout:
        z = F.dropout(z, dropout)
    t = _map(z, _interleaved(core, mode_Rc).T)
    if not drop_before_core and dropout:
        t = F.dropout(t, dropout)
    return _map(t.unflatten(-1, (c, down_RD.shape[0])), up_DR).flatten(-2)


def narrowing_delta(
    u: Tensor,
    down_RD: Tensor,
    up_DR: Tensor,
    core: Tensor,
    mode_Rc: Tensor,
    *,
    dropout: float = 0.0,
    drop_before_core: bool = False,
) -> Tensor:
    """Update of the second map of a feed-forward block, c D -> D, with c modes.

    The layout of `widening_delta`, transposed: the bottlenecks of the c contiguous chunks of `u` are concatenated and
    meet the R x c R matrix from its right, so the first axis of the core is the output here.

    Args:
        u: (..., c D), after the non-linearity.
        mode_Rc: c modes; the rest as in `mode_delta`.

    Returns:
        (..., D).

    Source: Aurora, arXiv 2305.08381, released code of the vision MLP.
    """
    c = mode_Rc.shape[1]
    y = _map(u.unflatten(-1, (c, down_RD.shape[1])), down_RD).flatten(-2)
    if drop_before_core and dropout:
        y = F.dropout(y, dropout)
    t = _map(y, _interleaved(core, mode_Rc))
    if not drop_before_core and dropout:
        t = F.dropout(t, dropout)
    return _map(t, up_DR)


def mode_weight(down_RD: Tensor, up_OR: Tensor, core: Tensor, mode_RK: Tensor) -> Tensor:
    """(K, O, D) weight updates of `mode_delta`: up G_k^T down."""
    return up_OR @ mode_slices(core, mode_RK).mT @ down_RD


def widening_weight(down_RD: Tensor, up_DR: Tensor, core: Tensor, mode_Rc: Tensor) -> Tensor:
    """(c D, D) weight update of `widening_delta`."""
    chunks = _interleaved(core, mode_Rc).unflatten(1, (mode_Rc.shape[1], -1)).permute(1, 2, 0)
    return (up_DR @ chunks @ down_RD).flatten(0, 1)


def narrowing_weight(down_RD: Tensor, up_DR: Tensor, core: Tensor, mode_Rc: Tensor) -> Tensor:
    """(D, c D) weight update of `narrowing_delta`."""
    chunks = _interleaved(core, mode_Rc).unflatten(1, (mode_Rc.shape[1], -1)).transpose(0, 1)
    return (up_DR @ chunks @ down_RD).permute(1, 0, 2).flatten(1)


def _interleaved(core: Tensor, mode_Rc: Tensor) -> Tensor:
    """(R, c R), column c j + k = column j of slice k."""
    return mode_slices(core, mode_Rc).permute(1, 2, 0).flatten(1)


def _map(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T with the rows in one matrix: torch would choose the kernel, and with it the last bits, by who needs
    gradient, and a loaded adapter would differ from the one in training."""
    return F.linear(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])


def _check(core: Tensor, mode_RK: Tensor) -> None:
    rank = mode_RK.shape[0]
    if mode_RK.dim() != 2 or core.dim() not in (1, 3) or any(n != rank for n in core.shape):
        raise ValueError(
            f"core {tuple(core.shape)} and mode {tuple(mode_RK.shape)}: expected (R, R, R) or (R,), and (R, K)"
        )
