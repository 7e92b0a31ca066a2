"""One p-Laplacian step over an attention map that is at hand and small: few operations, forward and backward."""

# B batch, H heads, X = B H, N query tokens, M value tokens, b channels of a node; D_ij = g_j - f_i
# Channels lead in everything that has a number for each channel of an edge: its innermost axis is then a long one.

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.p_laplacian import EPS, check_shapes

MOST = 1 << 19  # numbers that a call may hold for its backward pass: 2 MiB
HELD = 6  # numbers that it holds for each edge, beside its differences
# Scalars that are tensors: an operation takes half as long with them as with a number, which it makes a tensor of.
ONE, LEAST = (
    {t: torch.full((), x, dtype=t, device="cpu") for t in (torch.float32, torch.float64)} for x in (1.0, EPS)
)


def fits(shape: tuple[int, ...], channels: int, like: Tensor) -> bool:
    """Whether a map of that shape and nodes of so many channels, with the dtype and device of `like`, are for
    `p_laplacian_of_map`.

    It reads p and mu as numbers, for which a GPU would have to be waited for; autocast would round its products.
    """
    if torch.is_autocast_enabled("cpu"):
        return False
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return False
    return math.prod(shape) * (HELD + channels) <= MOST


def p_laplacian_of_map(
    A: Tensor, f: Tensor | None, g: Tensor, p: Tensor | float, mu: Tensor | float, *, self_term: bool, square: bool
) -> Tensor:
    """`p_laplacian` with one p and one mu, where `fits`; some fifteen operations forward and thirty backward.

    The dense form lets autograd differentiate each of its operations, and the tiled form prepares and adds up blocks.

    Args:
        A: as in `p_laplacian`, float32 or float64, as the nodes.
        f: query nodes; None for a square graph, whose rows are the last rows of `g`.

    Returns:
        (B, H, N, b). Gradients reach A, f, g, p and mu, once: a second derivative is refused.

    Raises:
        ValueError: shapes that do not belong together.

    Source: as `p_laplacian`; the gradients are those of `p_laplacian_attention`.
    """
    check_shapes(A, g[..., g.shape[-2] - A.shape[-2] :, :] if f is None else f, g)
    if square != (f is None):
        raise ValueError("a square graph, and no other, has its query nodes in g: give f=None")
    return _Step.apply(A, f, g, p, mu, self_term)


class Numbers(NamedTuple):
    """What a step knows beside tensors.

    Squared distances are counted in a unit of their own. The weights then lack a factor, which c lacks too, so that
    no result knows of it. Below p = 2 the self loop of a square graph is heavy, and its ln n^2 far from all others: in
    its own unit, eps^2, it is small, and the heavy terms cancel before they count.
    """

    square: bool
    self_term: bool
    power: float  # p
    c: float  # 2 mu / p, over the factor
    per_mu: float  # c / mu
    first: int  # column that is the first row's own node
    unit: float  # of n^2


class Held(NamedTuple):
    """Tensors that the backward pass of a step reads."""

    A: Tensor  # (X, N, M), and so are those without another shape
    apart: Tensor  # D, (X, b, N, M)
    f: Tensor | None  # (X, b, N), where the backward pass reads it
    g: Tensor | None  # (X, b, M), likewise
    lifted: Tensor  # A + eps
    root: Tensor  # of that
    norm: Tensor  # n^2
    slope: Tensor  # weight over A
    weight: Tensor
    sums: Tensor  # sum_j w_ij + c, (X, 1, N)
    V: Tensor  # U, less f on a square graph, (X, b, N)


def step(A: Tensor, f: Tensor | None, g: Tensor, power: float, pull: float, self_term: bool) -> tuple[Held, Numbers]:
    """V of `p_laplacian_of_map` without autograd, and what `step_backward` needs; U is V, plus f on a square graph.

    Args:
        A: (X, N, M).
        f, g: nodes (X, b, N) and (X, b, M); f None on a square graph. All are contiguous.
    """
    square, columns, rows = f is None, A.shape[2], A.shape[1]
    unit = EPS**2 if square and power < 2 else 1.0
    per_mu = 2 / power * unit ** (1 - power / 2)
    c = per_mu * pull
    if square:
        f = g if rows == columns else g[..., columns - rows :]
    apart = g.unsqueeze(2) - f.unsqueeze(3)  # 0 for self loops, whose two nodes are one
    lifted = torch.add(A, ONE[A.dtype], alpha=EPS)
    root = lifted.sqrt()
    scaled = _scaled(apart, root, unit)
    norm = scaled.mul_(scaled).sum(1).clamp_min_(torch.finfo(A.dtype).tiny / unit)
    slope = norm ** (power / 2 - 1)
    weight = slope * A
    of_channels = weight.unsqueeze(1)
    sums = of_channels.sum(-1).add_(ONE[A.dtype], alpha=c)
    # On a square graph a self loop may hold nearly all of a row: from differences U - f is computed without it.
    V = (of_channels * apart).sum(-1) if square else torch.bmm(g, weight.mT)
    if self_term != square:
        V.add_(f, alpha=c if self_term else -c)
    V.div_(sums)
    needed = self_term != square
    held = Held(A, apart, f if needed else None, None if square else g, lifted, root, norm, slope, weight, sums, V)
    return held, Numbers(square, self_term, power, c, per_mu, columns - rows, unit)


class Given(NamedTuple):
    """Gradients of a step; those of p and mu are numbers."""

    A: Tensor | None  # (X, N, M)
    f: Tensor | None  # (X, b, N), None on a square graph
    g: Tensor  # (X, b, M)
    p: float
    mu: float


def step_backward(held: Held, numbers: Numbers, scaled: Tensor, of_A: bool = True, of_p: bool = True) -> Given:
    """Gradients of a step.

    Args:
        scaled: gradient of U, over `held.sums`, (X, b, N), contiguous.
    """
    A, apart, f, g, lifted, root, norm, slope, weight, _, V = held
    square, self_term, power, c, per_mu, first, unit = numbers
    of_V = (scaled * V).sum(1, keepdim=True)
    surplus = of_V
    if self_term != square:
        of_f = (scaled * f).sum(1, keepdim=True)
        surplus = of_V - of_f if self_term else of_V + of_f
    # On a square graph seen from the row's own node: a self loop may hold nearly all of a row, and its dw is exact.
    if square:
        dw = (scaled.unsqueeze(3) * apart).sum(1).sub_(of_V.mT)
    else:
        dw = torch.baddbmm(of_V.mT, scaled.mT, g, beta=-1)
    h = dw * weight
    steep = h / norm  # and (power - 2), where it is used
    if square:
        steep.diagonal(first, 1, 2).zero_()
    E = _scaled(apart, root, unit)
    dA = None
    if of_A:
        # n^2 in the unit moves with A as sum_c E_c (E_c - eps) / (A + eps), eps in the unit
        moves = torch.sub(norm, E.sum(1), alpha=EPS / math.sqrt(unit)).mul_(steep)
        dA = (dw * slope).addcdiv_(moves, lifted, value=power / 2 - 1)
    toward = (power - 2) / math.sqrt(unit)
    E.mul_(steep.mul_(root).unsqueeze(1))
    of_rows, of_columns = E.sum(3), E.sum(2)
    if square and not first:
        of_columns -= of_rows
    dg = torch.baddbmm(of_columns, scaled, weight, beta=toward)
    if not square:
        df = of_rows.mul_(-toward)
        if self_term:
            df.add_(scaled, alpha=c)
    else:
        df, own = None, dg[..., first:]
        if first:
            own.sub_(of_rows, alpha=toward)
        if self_term:
            own.add_(scaled, alpha=c)
    of_c = -float(surplus.sum())
    dc = c * of_c
    dp = 0.0
    if of_p:
        # sum_ij h_ij is -dc; c = 2 mu / p, over a power of the unit, stands beside p's own place in the weights.
        dp = (float(torch.dot(norm.log().view(-1), h.view(-1))) - dc * math.log(unit)) / 2 - dc / power
    return Given(dA, df, dg, dp, per_mu * of_c)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, A: Tensor, f: Tensor | None, g: Tensor, p: Tensor | float, mu: Tensor | float, self_term: bool
    ) -> Tensor:
        lead, rows = A.shape[:2], g[..., g.shape[2] - A.shape[2] :, :] if f is None else f
        A = A.reshape(-1, *A.shape[2:]).contiguous()
        nodes = None if f is None else _channels_first(f), _channels_first(g)
        held, ctx.numbers = step(A, *nodes, float(p), float(mu), self_term)
        ctx.save_for_backward(*held)
        ctx.of = [x if isinstance(x, Tensor) else None for x in (p, mu)]
        U = held.V.view(*lead, *held.V.shape[1:]).mT
        return rows + U if f is None else U.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dU: Tensor) -> tuple[Tensor | None, ...]:
        of_A, _, _, of_p, of_mu, _ = ctx.needs_input_grad
        held = Held(*ctx.saved_tensors)
        lead = dU.shape[:2]
        given = step_backward(held, ctx.numbers, _channels_first(dU).div_(held.sums), of_A, of_p)
        dA, df, dg = (None if x is None else x.view(*lead, *x.shape[1:]) for x in (given.A, given.f, given.g))
        p, mu = ctx.of
        dp, dmu = torch.full_like(p, given.p) if of_p else None, torch.full_like(mu, given.mu) if of_mu else None
        return dA, None if df is None else df.mT, dg.mT, dp, dmu, None


def _channels_first(nodes: Tensor) -> Tensor:
    """(B, H, n, b) -> (X, b, n), a copy."""
    return nodes.mT.clone(memory_format=torch.contiguous_format).view(-1, *nodes.mT.shape[2:])


def _scaled(apart: Tensor, root: Tensor, unit: float) -> Tensor:
    """sqrt(A + eps) D + eps, whose length is n, over the root of the unit: that is eps or 1."""
    own = unit != 1
    least = (ONE if own else LEAST)[root.dtype]
    return torch.addcmul(least, apart, root.unsqueeze(1), value=1 / EPS if own else 1.0)
