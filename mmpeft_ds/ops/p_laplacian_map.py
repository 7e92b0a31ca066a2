"""One p-Laplacian step over an attention map that is at hand and small: few operations, forward and backward."""

# B batch, H heads, N query tokens, M value tokens, b channels of a node; D_ij = g_j - f_i

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.p_laplacian import EPS, check_shapes

MOST = 1 << 19  # numbers that a call may hold for its backward pass: 2 MiB
HELD = 6  # numbers that it holds for each edge


def fits(shape: tuple[int, ...], like: Tensor) -> bool:
    """Whether a map of that shape and nodes such as `like`, (B, H, *, b), are for `p_laplacian_of_map`.

    It reads p and mu as numbers, for which a GPU would have to be waited for; autocast would round its products.
    """
    if torch.is_autocast_enabled("cpu"):
        return False
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return False
    return math.prod(shape) * (HELD + like.shape[-1]) <= MOST


def p_laplacian_of_map(
    A: Tensor, f: Tensor | None, g: Tensor, p: Tensor | float, mu: Tensor | float, *, self_term: bool, square: bool
) -> Tensor:
    """`p_laplacian` with one p and one mu, where `fits`; some thirty operations forward and forty backward.

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
    """What a step knows beside tensors."""

    square: bool
    self_term: bool
    power: float  # p
    c: float  # 2 mu / p
    first: int  # row of g that is the first row's own node
    least: float  # n^2 of a self loop


class Held(NamedTuple):
    """Tensors that the backward pass of a step reads; of each edge the map, sums of its difference, and the weight."""

    A: Tensor
    f: Tensor
    g: Tensor
    norm: Tensor
    slope: Tensor
    weight: Tensor
    squared: Tensor
    total: Tensor
    root: Tensor
    alpha: Tensor
    V: Tensor


def step(
    A: Tensor, f: Tensor | None, g: Tensor, power: float, mu: float, self_term: bool
) -> tuple[Tensor, Held, Numbers]:
    """U of `p_laplacian_of_map` without autograd, and what `step_backward` needs."""
    square, c = f is None, 2 * mu / power
    first, least = g.shape[-2] - A.shape[-2], g.shape[-1] * EPS**2
    g = g.contiguous()
    f = g[..., first:, :] if square else f.contiguous()
    apart = _apart(f, g)  # 0 for self loops, whose two nodes are one
    squared, total = (apart * apart).sum(-3), apart.sum(-3)
    root = (A + EPS).sqrt_()
    norm = (root * squared).add_(total, alpha=2 * EPS).mul_(root).add_(least)
    slope = norm.clamp_min_(torch.finfo(A.dtype).tiny) ** (power / 2 - 1)
    weight = slope * A
    own = None
    if square:
        # A self loop may hold nearly all of a row: U - f is computed without it.
        loops = weight.diagonal(first, -2, -1)
        own = loops.clone()
        loops.zero_()
    sums, V = weight.sum(-1, keepdim=True), weight @ g
    if square:
        V.addcmul_(sums, f, value=-1)
        loops.copy_(own)
        sums += own.unsqueeze(-1)
    alpha = sums.add_(c).reciprocal_()
    if self_term != square:
        V.add_(f, alpha=c if self_term else -c)
    V *= alpha
    held = Held(A, f, g, norm, slope, weight, squared, total, root, alpha, V)
    return f + V if square else V, held, Numbers(square, self_term, power, c, first, least)


class Given(NamedTuple):
    """Gradients of a step; those of p and mu are numbers."""

    A: Tensor | None
    f: Tensor | None  # None on a square graph
    g: Tensor
    p: float
    mu: float


def step_backward(held: Held, numbers: Numbers, dU: Tensor, of_A: bool = True, of_p: bool = True) -> Given:
    """Gradients from that of U, (B, H, N, b)."""
    A, f, g, norm, slope, weight, squared, total, root, alpha, V = held
    square, self_term, power, c, first, least = numbers
    # As in `p_laplacian_edges.Gradients`: everything is seen from the row's own node on a square graph.
    scaled = alpha * dU
    dU_V = (scaled * V).sum(-1, keepdim=True)
    dU_f = (scaled * f).sum(-1, keepdim=True) if square or self_term else None
    level = dU_V + dU_f if square else dU_V
    surplus = dU_V if square == self_term else level if square else dU_V - dU_f
    dw = (scaled @ g.mT).sub_(level)
    if square:
        dw.diagonal(first, -2, -1).copy_(-dU_V.squeeze(-1))
    h = dw * weight
    steep = h / norm  # and (power - 2), where it is used
    if square:
        steep.diagonal(first, -2, -1).zero_()
    dA = None
    if of_A:
        dA = (dw * slope).add_(torch.add(squared, total / root, alpha=EPS).mul_(steep), alpha=power / 2 - 1)
    steep *= root
    apart = _apart(f, g).mul_(root.unsqueeze(-3)).add_(EPS).mul_(steep.unsqueeze(-3))
    dg = (weight.mT @ scaled).add_(apart.sum(-2).mT, alpha=power - 2)
    df = apart.sum(-1).mT * (2 - power)
    if self_term:
        df.add_(scaled, alpha=c)
    if square:
        dg[..., first:, :] += df
    heavy = square and power < 2
    if heavy:
        h.diagonal(first, -2, -1).zero_()
    dc = -float(surplus.sum())
    dp = _of_p(h, norm, dc, numbers, math.log(least) if heavy else 0.0) if of_p else 0.0
    return Given(dA, None if square else df, dg, dp, 2 * dc / power)


def _of_p(h: Tensor, norm: Tensor, dc: float, numbers: Numbers, lowest: float) -> float:
    """Gradient of p.

    Args:
        h: dw_ij w_ij; 0 for self loops where they hold nearly all of their rows.
        dc: gradient of c.
        lowest: ln n^2 of these self loops, else 0. h (ln n^2 - lowest) is added up edge by edge; lowest times the sum
            of all h, self loops included, follows from the gradient of c, where their large terms cancel.
    """
    above = float(norm.log().sub_(lowest).mul_(h).sum())
    # sum_ij h_ij is -c dc; c = 2 mu / p stands beside p's own place in the weights.
    return (above - numbers.c * dc * lowest) / 2 - numbers.c * dc / numbers.power


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, A: Tensor, f: Tensor | None, g: Tensor, p: Tensor | float, mu: Tensor | float, self_term: bool
    ) -> Tensor:
        U, held, ctx.numbers = step(A, f, g, float(p), float(mu), self_term)
        ctx.save_for_backward(*held)
        ctx.of = [x if isinstance(x, Tensor) else None for x in (p, mu)]
        return U

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dU: Tensor) -> tuple[Tensor | None, ...]:
        of_A, _, _, of_p, of_mu, _ = ctx.needs_input_grad
        given = step_backward(Held(*ctx.saved_tensors), ctx.numbers, dU, of_A, of_p)
        p, mu = ctx.of
        dp, dmu = torch.full_like(p, given.p) if of_p else None, torch.full_like(mu, given.mu) if of_mu else None
        return given.A, given.f, given.g, dp, dmu, None


def _apart(f: Tensor, g: Tensor) -> Tensor:
    """D with channels first, (B, H, b, N, M)."""
    return g.mT.unsqueeze(-2) - f.mT.unsqueeze(-1)
