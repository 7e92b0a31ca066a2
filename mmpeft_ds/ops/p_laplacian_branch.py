"""The gated branch of p-Adapter on a small attention map as one function with its gradient written out."""

# B batch, H heads, N query tokens, M value tokens, d width, b channels of a node, r = H b

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmpeft_ds.ops.p_laplacian_map import Held, step, step_backward


class Maps(NamedTuple):
    """The linear maps of a branch: weights (r, d), (r, d) and (d, r), and their biases."""

    down_weight: Tensor
    down_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


class Exponent(NamedTuple):
    """p and the pull: `p` as it is trained, used within `bounds`; mu (2 + tanh(m)).

    Attributes:
        p: one element, or a number that is used as it is.
        m: one element.
    """

    p: Tensor | float
    m: Tensor
    mu: float
    bounds: tuple[float, float] | None


class Scores(NamedTuple):
    """An attention map by what makes it, as `attention_probabilities` takes it; `mask` gets no gradient."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float | None


def plus_branch(
    h: Tensor, A: Tensor | Scores, values: Tensor, queries: Tensor | None, maps: Maps, exponent: Exponent, heads: int
) -> Tensor:
    """`h + up(gelu(gate(h)) * U)`, U the query nodes after a step over A with nodes `down(values)` cut into heads.

    Where `p_laplacian_map.fits`. As some twenty operations of autograd the same takes twice as long on small maps.

    Args:
        h: attention output, (B, N, d).
        A: attention map, (B, H, N, M), or what makes it, in the dtype of `h`.
        values: projected value tokens, (B, M, d).
        queries: projected query tokens, (B, N, d); None for a square graph, whose rows are the last value tokens.

    Returns:
        (B, N, d). A second derivative is refused.

    Source: as `p_laplacian`, released code of the adapter.
    """
    rows = h if queries is None else queries
    made = (*A.query.shape[:3], A.key.shape[2]) if isinstance(A, Scores) else A.shape
    wanted = (h.shape[0], heads, rows.shape[1], values.shape[1])
    if made != wanted or rows.shape != h.shape or (queries is None and values.shape[1] < h.shape[1]):
        raise ValueError(
            f"attention {tuple(made)} of {heads} heads does not belong to tokens {tuple(h.shape)}, queries "
            f"{tuple(rows.shape)} and values {tuple(values.shape)}"
        )
    trained, fixed = (exponent.p, None) if isinstance(exponent.p, Tensor) else (None, exponent.p)
    of_map: tuple[Any, ...] = (None, *A) if isinstance(A, Scores) else (A, None, None, None, False, None)
    options = _Options(heads, fixed, exponent.mu, exponent.bounds)
    return _Branch.apply(h, *of_map, values, queries, trained, exponent.m, options, *maps)


class _Options(NamedTuple):
    heads: int
    p: float | None
    mu: float
    bounds: tuple[float, float] | None


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, A: Tensor | None, query: Tensor | None, key: Tensor | None, mask: Tensor | None,
        causal: bool, scaling: float | None, values: Tensor, queries: Tensor | None, p: Tensor | None, m: Tensor,
        options: _Options, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        maps = Maps(*tensors)
        if A is None:
            ctx.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            A = _attended(query, key, mask, causal, ctx.scaling)
        power, pull = _used(p, m, options)
        g = _nodes(values, maps, options.heads)
        f = None if queries is None else _nodes(queries, maps, options.heads)
        U, held, ctx.numbers = step(A, f, g, power, pull, self_term=queries is None)
        tokens = h.reshape(-1, h.shape[-1])
        moved = U.transpose(1, 2).reshape(len(tokens), -1)
        level = functional.linear(tokens, maps.gate_weight, maps.gate_bias)
        # Transposed, it is torch's own kernel: oneDNN's, for contiguous tensors, takes six times as long to start.
        gate = functional.gelu(level.T).T
        inner = gate * moved
        out = functional.linear(inner, maps.up_weight, maps.up_bias).add_(tokens)
        ctx.save_for_backward(query, key, tokens, values, queries, p, m, moved, level, gate, inner, *held, *maps)
        ctx.options = options
        return out.view(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, tokens, values, queries, p, m, moved, level, gate, inner, *rest = ctx.saved_tensors
        held, maps = Held(*rest[: len(Held._fields)]), Maps(*rest[len(Held._fields) :])
        of_h, of_A, of_query, of_key, _, _, _, of_values, of_queries, of_p, of_m, *_ = ctx.needs_input_grad
        whole = gradient.reshape(tokens.shape)
        given_inner = whole @ maps.up_weight
        given_level = torch.ops.aten.gelu_backward((given_inner * moved).T, level.T).T
        given_U = given_inner.mul_(gate).view(*gradient.shape[:2], ctx.options.heads, -1).transpose(1, 2)
        given = step_backward(held, ctx.numbers, given_U, of_A or of_query or of_key, of_p)
        given_query = given_key = None
        if of_query or of_key:
            scores = torch.ops.aten._softmax_backward_data(given.A, held.A, -1, held.A.dtype).mul_(ctx.scaling)
            given_query, given_key = scores @ key, scores.mT @ query
        given_values, down_weight, down_bias = _of_nodes(given.g, values, maps.down_weight, of_values)
        given_queries = None
        if given.f is not None:
            given_queries, weight, bias = _of_nodes(given.f, queries, maps.down_weight, of_queries)
            down_weight += weight
            down_bias += bias
        return (
            torch.addmm(whole, given_level, maps.gate_weight).view(gradient.shape) if of_h else None,
            given.A if of_A else None,
            given_query,
            given_key,
            *[None] * 3,
            given_values,
            given_queries,
            _of_exponent(p, given.p, ctx.options.bounds) if of_p else None,
            torch.full_like(m, given.mu * ctx.options.mu * (1 - math.tanh(float(m)) ** 2)) if of_m else None,
            None,
            down_weight,
            down_bias,
            given_level.T @ tokens,
            given_level.sum(0),
            (inner.T @ whole).T,
            whole.sum(0),
        )


def _attended(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    """`attention_probabilities` without autograd, in the memory of the scores."""
    scores = (query @ key.mT).mul_(scaling)
    rows, columns = scores.shape[-2:]
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    if causal:
        scores.masked_fill_(_ahead(rows, columns), -math.inf)
    A = scores.softmax(-1)
    if mask is None and (not causal or rows <= columns):
        return A
    return A.masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0.0)


@functools.lru_cache(maxsize=8)
def _ahead(rows: int, columns: int) -> Tensor:
    """(N, M), True for keys that come after a row's own."""
    return torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)


def _used(p: Tensor | None, m: Tensor, options: _Options) -> tuple[float, float]:
    """p and mu as the step takes them."""
    power = options.p if p is None else float(p)
    if options.bounds is not None:
        power = min(max(power, options.bounds[0]), options.bounds[1])
    return power, options.mu * (2 + math.tanh(float(m)))


def _of_exponent(p: Tensor, gradient: float, bounds: tuple[float, float] | None) -> Tensor:
    """Gradient of p, which passes outside of the bounds where a descent step leads back inside."""
    value = float(p)
    if bounds is not None and ((value <= bounds[0] and gradient > 0) or (value >= bounds[1] and gradient < 0)):
        gradient = 0.0
    return torch.full_like(p, gradient)


def _nodes(tokens: Tensor, maps: Maps, heads: int) -> Tensor:
    """(B, n, d) -> (B, H, n, b)."""
    wide = functional.linear(tokens, maps.down_weight, maps.down_bias)
    return wide.view(*tokens.shape[:2], heads, -1).transpose(1, 2)


def _of_nodes(given: Tensor, tokens: Tensor, weight: Tensor, of_tokens: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the tokens, and of the weight and bias that make nodes of them."""
    wide = given.transpose(1, 2).reshape(-1, weight.shape[0])
    given_tokens = (wide @ weight).view(tokens.shape) if of_tokens else None
    return given_tokens, wide.T @ tokens.reshape(-1, tokens.shape[-1]), wide.sum(0)
