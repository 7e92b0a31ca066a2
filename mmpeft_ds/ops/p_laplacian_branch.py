"""The gated branch of p-Adapter on a small attention map as one function with its gradient written out."""

# B batch, H heads, N query tokens, M value tokens, d width, b channels of a node, r = H b

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmpeft_ds.ops.beside_linear import Linear, Onto, split
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


class Hidden(NamedTuple):
    """Keys that rows do not see, of one shape of map; computed once for all layers that have the same mask.

    Attributes:
        added: (X, N, M), what is added to the scores; None: nothing.
        empty: (X, N, 1) bool, rows that see nothing; None: there is none.
    """

    added: Tensor | None
    empty: Tensor | None


class Scores(NamedTuple):
    """An attention map by what makes it, as `attention_probabilities` takes it; `hidden` gets no gradient."""

    query: Tensor
    key: Tensor
    hidden: Hidden
    scaling: float | None


class Nodes(NamedTuple):
    """Tokens of which nodes are made.

    Attributes:
        values: (B, M, d).
        queries: (B, N, d); None for a square graph, whose rows are the last value tokens.
        projection: map of all of them before they become nodes; None: they have been through it.
    """

    values: Tensor
    queries: Tensor | None
    projection: Linear | None


def plus_branch(
    onto: Onto, x: Tensor | None, A: Tensor | Scores, nodes: Nodes, maps: Maps, exponent: Exponent, heads: int
) -> Tensor:
    """`h + up(gelu(gate(h)) * U)`, U the query nodes after a step over A with nodes `down(values)` cut into heads.

    Where `p_laplacian_map.fits`. As some twenty operations of autograd the same takes twice as long on small maps.

    Args:
        onto: attention output h, (B, N, d), or the map that makes it of `x`.
        x: (B, N, I), read where `onto` is a map.
        A: attention map, (B, H, N, M), or what makes it, in the dtype of h.
        nodes: tokens of which nodes are made.

    Returns:
        (B, N, d). A second derivative is refused.

    Source: as `p_laplacian`, released code of the adapter.
    """
    end = (*split(onto), x if isinstance(onto, Linear) else None)
    batch, rows = (x if isinstance(onto, Linear) else onto).shape[:2]
    made = (*A.query.shape[:3], A.key.shape[2]) if isinstance(A, Scores) else A.shape
    columns, queries = nodes.values.shape[1], rows if nodes.queries is None else nodes.queries.shape[1]
    if made != (batch, heads, rows, columns) or queries != rows or (nodes.queries is None and columns < rows):
        raise ValueError(
            f"attention {tuple(made)} of {heads} heads does not belong to {batch} times {rows} tokens, {queries} "
            f"queries and {columns} values"
        )
    trained, fixed = (exponent.p, None) if isinstance(exponent.p, Tensor) else (None, exponent.p)
    of_map = (None, A.query, A.key, *A.hidden, A.scaling) if isinstance(A, Scores) else (A, *[None] * 5)
    options = _Options(heads, fixed, exponent.mu, exponent.bounds)
    weight, bias = nodes.projection or (None, None)
    tokens = nodes.values, nodes.queries, weight, bias
    return _Branch.apply(*end, *of_map, *tokens, trained, exponent.m, options, *maps)


class _Options(NamedTuple):
    heads: int
    p: float | None
    mu: float
    bounds: tuple[float, float] | None


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor | None, weight: Tensor | None, bias: Tensor | None, x: Tensor | None, A: Tensor | None,
        query: Tensor | None, key: Tensor | None, added: Tensor | None, empty: Tensor | None, scaling: float | None,
        values: Tensor, queries: Tensor | None, project: Tensor | None, project_bias: Tensor | None,
        p: Tensor | None, m: Tensor, options: _Options, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        maps = Maps(*tensors)
        if h is None:
            h = functional.linear(x, weight, bias)
        if project is not None:
            values = functional.linear(values, project, project_bias)
            queries = None if queries is None else functional.linear(queries, project, project_bias)
        if A is None:
            ctx.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            query, key = query.reshape(-1, *query.shape[2:]), key.reshape(-1, *key.shape[2:])
            A = _attended(query, key, added, empty, ctx.scaling)
        else:
            A = A.reshape(-1, *A.shape[2:]).contiguous()
        heads, square = options.heads, queries is None
        power, pull = _used(p, m, options)
        wide, g = _nodes(values, maps, heads)
        rows, f = (wide, None) if square else _nodes(queries, maps, heads)
        held, ctx.numbers = step(A, f, g, power, pull, self_term=square)
        batch, tokens = len(h), h.reshape(-1, h.shape[-1])
        moved = held.V.view(batch, heads, *held.V.shape[1:]).permute(0, 3, 1, 2)  # token by token, as `rows`
        if square:
            moved = rows[:, rows.shape[1] - h.shape[1] :] + moved
        moved = moved.reshape(len(tokens), -1)
        level = torch.addmm(maps.gate_bias, tokens, maps.gate_weight.T)
        # Transposed, it is torch's own kernel: oneDNN's, for contiguous tensors, takes six times as long to start.
        gate = functional.gelu(level.T).T
        inner = gate * moved
        out = torch.addmm(tokens, inner, maps.up_weight.T).add_(maps.up_bias)
        weights = weight, project, maps.down_weight, maps.gate_weight, maps.up_weight
        ctx.save_for_backward(query, key, tokens, values, queries, p, m, moved, level, gate, inner, *weights, *held)
        ctx.options = options
        return out.view(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, tokens, values, queries, p, m, moved, level, gate, inner, *rest = ctx.saved_tensors
        (weight, project, down, gate_weight, up), held = rest[:5], Held(*rest[5:])
        of_h, _, _, of_x, of_A, of_query, of_key, _, _, _, of_values, of_queries, _, _, of_p, of_m = (
            ctx.needs_input_grad[:16]
        )
        whole, (batch, rows, _) = gradient.reshape(tokens.shape), gradient.shape
        given_inner = whole @ up
        given_level = torch.ops.aten.gelu_backward((given_inner * moved).T, level.T).T
        given_U = given_inner.mul_(gate).view(batch, rows, ctx.options.heads, -1).permute(0, 2, 3, 1)
        sums = held.sums.view(*given_U.shape[:2], 1, -1)
        scaled = torch.div(given_U, sums, out=torch.empty_like(given_U, memory_format=torch.contiguous_format))
        given = step_backward(held, ctx.numbers, scaled.view(-1, *scaled.shape[2:]), of_A or of_query or of_key, of_p)
        given_A = given_query = given_key = None
        if of_query or of_key:
            scores = torch._softmax_backward_data(given.A, held.A, -1, held.A.dtype)
            lead = given_U.shape[:2]
            given_query = torch.baddbmm(query, scores, key, beta=0, alpha=ctx.scaling).view(*lead, *query.shape[1:])
            given_key = torch.baddbmm(key, scores.mT, query, beta=0, alpha=ctx.scaling).view(*lead, *key.shape[1:])
        elif of_A:
            given_A = given.A.view(*given_U.shape[:2], *given.A.shape[1:])
        given_h = torch.addmm(whole, given_level, gate_weight) if of_h or of_x else None
        given_values, down_weight, down_bias = _of_nodes(given.g, values, down, project, of_values)
        given_queries = None
        if given.f is not None:
            given_queries, more_weight, more_bias = _of_nodes(given.f, queries, down, project, of_queries)
            down_weight += more_weight
            down_bias += more_bias
        return (
            given_h.view(gradient.shape) if of_h else None,
            None,
            None,
            (given_h @ weight).view(batch, rows, -1) if of_x else None,
            given_A,
            given_query,
            given_key,
            *[None] * 3,
            given_values,
            given_queries,
            None,
            None,
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


def hidden_keys(mask: Tensor | None, causal: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Hidden:
    """What `mask` and `causal` of `attention_probabilities` hide in a map of that shape, (B, H, N, M)."""
    rows, columns = shape[-2:]
    if mask is None and not causal:
        return Hidden(None, None)
    added = torch.zeros(shape, dtype=dtype)
    if mask is not None:
        added = added.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else added.add_(mask)
    if causal:
        added.masked_fill_(torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1), -math.inf)
    added = added.view(-1, rows, columns)
    empty = added.amax(-1, keepdim=True) == -math.inf
    return Hidden(added, empty if empty.any() else None)


def _attended(query: Tensor, key: Tensor, added: Tensor | None, empty: Tensor | None, scaling: float) -> Tensor:
    """`attention_probabilities` without autograd, (X, N, M)."""
    if added is None:
        scores = torch.bmm(query, key.mT).mul_(scaling)
    else:
        scores = torch.baddbmm(added, query, key.mT, alpha=scaling)
    A = scores.softmax(-1)
    # Softmax of a row of -inf is NaN.
    return A if empty is None else A.masked_fill_(empty, 0.0)


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


def _nodes(tokens: Tensor, maps: Maps, heads: int) -> tuple[Tensor, Tensor]:
    """(B, n, d) -> (B, n, H, b), and the same as (X, b, n), contiguous."""
    flat = torch.addmm(maps.down_bias, tokens.reshape(-1, tokens.shape[-1]), maps.down_weight.T)
    wide = flat.view(*tokens.shape[:2], heads, -1)
    return wide, wide.permute(0, 2, 3, 1).reshape(-1, wide.shape[3], wide.shape[1]).contiguous()


def _of_nodes(
    given: Tensor, tokens: Tensor, weight: Tensor, project: Tensor | None, of_tokens: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the tokens, before `project` where there is one, and of the weight and bias that make nodes of
    them."""
    batch, count, _ = tokens.shape
    wide = given.view(batch, -1, *given.shape[1:]).permute(0, 3, 1, 2).reshape(batch * count, -1)
    given_tokens = wide @ weight if of_tokens else None
    if of_tokens and project is not None:
        given_tokens = given_tokens @ project
    weights = wide.T @ tokens.reshape(len(wide), -1), wide.sum(0)
    return given_tokens if given_tokens is None else given_tokens.view(batch, count, -1), *weights
