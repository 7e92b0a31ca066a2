"""p-Laplacian message passing straight from queries and keys: no tensor of N x M entries, in either direction."""

# B batch, H heads, N query tokens, M key tokens, G pooled key tokens, d width of a head, b channels of a node

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.p_laplacian import EPS, upcast
from mmpeft_ds.ops.p_laplacian_edges import Gradients, Job, Options, exponent_and_pull
from mmpeft_ds.ops.p_laplacian_sweeps import degree_backward, sweep, sweep_backward
from mmpeft_ds.ops.p_laplacian_triton import usable

GRAPHS = ("square", "bipartite", "pooled", "published")


def p_laplacian_attention(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    g: Tensor,
    p: Tensor | float,
    mu: Tensor | float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
    graph: str = "square",
    exact: bool = True,
    groups: int | None = None,
    self_term: bool | None = None,
    offset: int | None = None,
    eps: float = EPS,
    tile: tuple[int, int] | None = None,
    return_lse: bool = False,
    kernels: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`p_laplacian` of the attention of `q` on `k`, in tiles that are computed again for the backward pass.

    Memory beyond inputs and gradients is a few blocks of rows: it grows with N + M, not with their product.

    Args:
        q: queries as the scores use them (after rotary embedding), (B, H, N, d).
        k: keys, (B, H, M, d), heads repeated where groups of queries share them.
        f: query nodes, (B, H, N, b); on a square graph the same tensor as `g`, or its rows from `offset` on.
        g: value nodes, (B, H, M, b); pooled (B, H, G, b); published the undivided value nodes.
        p: exponent, one element or one per head, (H,).
        mu: strength of the pull to the own node, > 0, one element or one per head.
        mask: broadcastable to (B, H, N, M): bool with True = attend, or a term added to the scores. A constant.
        causal: row i sees columns up to i + offset.
        scaling: factor on the scores, d^(-1/2) when not given.
        graph: `square`, rows and columns are the same nodes; `bipartite`; `pooled`, keys averaged to `groups` bins
            after the softmax as `pool_keys` does; `published`, `p_laplacian_published`, not with `causal`.
        exact: True equals the released formula in two sweeps. False leaves eps out of all edges but self loops, in one
            sweep over the keys. `published` has no eps either way.
        groups: G of the pooled graph.
        self_term: c f_i in the numerator; by default on square and published graphs.
        offset: column that stands for row 0 in `causal` and on a square graph; M - N when not given.
        eps: as in `p_laplacian`.
        tile: rows and columns of a tile; chosen by device when not given.
        return_lse: also return the log-sum-exp of each row's scores, (B, H, N), without gradient.
        kernels: use Triton kernels where they can be used (`p_laplacian_triton.usable`); they compute in float32.

    Returns:
        U, (B, H, N, b) in the dtype of `f`; computed in float32, or float64 if an input is. A row that sees no key is
        0, or its own node where `self_term` holds. Gradients reach q, k, f, g, p and mu, once: a second derivative is
        refused.

    Raises:
        ValueError: shapes, a graph or a combination that cannot be.

    Source: Wu et al., AAAI 2024, as released and (published) eqs. 9-15; the streaming form is our derivation: without
    eps, w_ij = exp(p/2 (s_ij - L_i) + (p-2)/2 ln |D_ij|^2) is an attention with altered scores.
    """
    offset = k.shape[-2] - q.shape[-2] if offset is None else offset
    _check(q, k, f, g, mask, causal, graph, groups, offset)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    options = Options(
        graph=graph,
        exact=exact and graph != "published",
        self_term=graph in ("square", "published") if self_term is None else self_term,
        groups=groups,
        causal=causal,
        offset=offset,
        scaling=q.shape[-1] ** -0.5 if scaling is None else scaling,
        eps=eps,
        tile=tile,
    )
    # Outside of the function, so that autograd casts the gradients of p and mu back to their shape, dtype and device.
    *_, p, mu = upcast(q, k, f, g, p, mu)
    U, lse = _form(q, k, f, g, kernels).apply(q, k, f, g, p, mu, mask, options)
    return (U, lse) if return_lse else U


def _form(q, k, f, g, kernels: bool) -> type[torch.autograd.Function]:
    if not (kernels and usable(q, k, f.shape[-1], torch.promote_types(f.dtype, g.dtype))):
        return _Streaming
    from mmpeft_ds.ops.p_laplacian_triton.function import Fused  # imports Triton

    return Fused


class _Streaming(torch.autograd.Function):
    """Saves the inputs and, per row, L, alpha, the own weight and U - f or U; pooled graphs their (B, H, N, G) map."""

    @staticmethod
    def forward(ctx, q, k, f, g, p, mu, mask, options):
        with torch.autocast(q.device.type, enabled=False):
            job = Job(q, k, f, g, p, mu, mask, options)
            V = torch.empty_like(job.f)
            alpha, own, lse = (V.new_empty((*V.shape[:-1], n)) for n in (1, 1, 2))
            pooled = V.new_empty((*V.shape[:-1], options.groups)) if options.graph == "pooled" else None
            # Seen from the row's own node on a square graph, where U - f is a small part of U.
            seen_from = 1.0 if job.square else 0.0
            for rows in job.tiles.rows():
                block = sweep(job, rows)
                alpha[..., rows, :] = 1 / (block.total + block.own + job.c)
                pull = options.self_term * job.c - seen_from * (block.total + job.c)
                V[..., rows, :] = (block.numerator + pull * job.f[..., rows, :]) * alpha[..., rows, :]
                lse[..., rows, :], own[..., rows, :] = block.lse, block.own
                if pooled is not None:
                    pooled[..., rows, :] = block.pooled
            U = job.f + V if job.square else V.clone()
        ctx.save_for_backward(q, k, f, g, p, mu, mask, V, alpha, lse, own if pooled is None else pooled, job.degree)
        ctx.options = options
        returned = lse.sum(-1)
        ctx.mark_non_differentiable(returned)
        return U.to(f.dtype), returned

    @staticmethod
    @once_differentiable
    def backward(ctx, dU, _):
        q, k, f, g, p, mu, mask, V, alpha, lse, own, degree = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            job = Job(q, k, f, g, p, mu, mask, ctx.options, degree)
            grads = Gradients(job, dU.to(V.dtype), V, alpha, lse, own)
            scores = any(ctx.needs_input_grad[:2])
            for rows in job.tiles.rows():
                sweep_backward(job, grads, rows, scores)
            dg = grads.dg_T.mT if degree is None else degree_backward(job, grads, scores)
            dq, dk = job.tiles.gradients() if scores else (q, k)
            dp, dmu = exponent_and_pull(grads, p, mu)
        gradients = (dq.to(q.dtype), dk.to(k.dtype), grads.df.to(f.dtype), dg.to(g.dtype), dp, dmu)
        wanted = (d if needed else None for d, needed in zip(gradients, ctx.needs_input_grad, strict=False))
        return *wanted, None, None


def _check(q, k, f, g, mask, causal, graph, groups, offset) -> None:
    if graph not in GRAPHS:
        raise ValueError(f"graph {graph!r} is none of {', '.join(GRAPHS)}")
    if (graph == "pooled") != (groups is not None):
        raise ValueError("groups is the number of pooled keys: give it with graph='pooled' and only there")
    if groups is not None and groups < 1:
        raise ValueError(f"groups {groups} must be at least 1")
    if causal and graph == "published":
        raise ValueError(
            "graph='published' sums attention over all queries, so under causal=True it would see the future: "
            "use graph='square' or 'bipartite'"
        )
    lead, (rows, columns) = q.shape[:2], (q.shape[-2], k.shape[-2])
    nodes = groups if graph == "pooled" else columns
    if q.ndim != 4 or k.shape != (*lead, columns, q.shape[-1]):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, H, N, d) and (B, H, M, d)")
    if f.shape[:-1] != (*lead, rows) or g.shape[:-1] != (*lead, nodes) or f.shape[-1] != g.shape[-1]:
        raise ValueError(
            f"graph={graph!r} needs nodes f {(*lead, rows, 'b')} and g {(*lead, nodes, 'b')}, "
            f"not {tuple(f.shape)} and {tuple(g.shape)}"
        )
    if graph == "square" and not 0 <= offset <= columns - rows:
        raise ValueError(f"square graph: {rows} rows cannot be columns from {offset} on of {columns}; set offset")
    if mask is not None:
        if mask.requires_grad:
            raise ValueError("mask gets no gradient here: detach it")
        if mask.ndim > 4 or any(
            a not in (1, b) for a, b in zip(mask.shape[::-1], (columns, rows, *lead[::-1]), strict=False)
        ):
            raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {(*lead, rows, columns)}")
