"""Other propagation rules on the graphs of `p_laplacian`: what p-Adapter's ablation puts in its place."""

# B batch, H heads, N query tokens, M value tokens, b channels of a node

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmpeft_ds.ops.p_laplacian import check_shapes, upcast

# All take A (B, H, N, M), f (B, H, N, b), g (B, H, M, b) as `p_laplacian` does and return (B, H, N, b) in f's dtype.
# The graph is directed and rows are normalised: P = D^-1 A with D the row sums, 1 for a softmax and less for a pooled
# map. The symmetric form would divide by column sums, that is by what later queries attend to: no causal decoder could
# use it, nor a cache. For the same reason values never receive from queries: of a bipartite graph only the query rows
# move, and `steps` then changes nothing after the first.


def gcn(A: Tensor, f: Tensor, g: Tensor, *, square: bool) -> Tensor:
    """Normalised aggregation U = P g, without weights: p_laplacian's limit for p = 2 and mu = 0.

    Source: Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017, eq. 8, in
    the random-walk normalisation; its weight and non-linearity are the adapter's own projections.
    """
    return _propagate(A, f, g, teleport=0.0, steps=1, square=square)


def appnp(A: Tensor, f: Tensor, g: Tensor, *, square: bool, teleport: float = 0.1, steps: int = 1) -> Tensor:
    """Personalised PageRank: Z <- (1 - teleport) P Z + teleport f, `steps` times from Z = g.

    Args:
        A, f, g: see the top of the file.
        square: rows and columns are the same nodes; more than one step needs all of them (N = M), so it cannot be
            continued from a cache.
        teleport: weight of the own features, in [0, 1]; published 0.1.
        steps: published 10 on citation graphs; 1 applies the rule once, as p-Adapter does its own.

    Source: Gasteiger, Bojchevski, Guennemann, "Predict then Propagate", ICLR 2019, eq. 4.
    """
    return _propagate(A, f, g, teleport=teleport, steps=steps, square=square)


def gcnii(
    A: Tensor,
    f: Tensor,
    g: Tensor,
    weight: Tensor,
    *,
    square: bool,
    teleport: float = 0.1,
    decay: float = 0.5,
    layer: int = 1,
) -> Tensor:
    """One layer with initial residual and identity mapping: relu(S ((1 - beta) I + beta W)), S = appnp with one step.

    Args:
        A, f, g, square: see the top of the file.
        weight: W, trained, (b, b) for all heads or (H, b, b), applied to rows: S @ W.
        teleport: weight of the initial residual (alpha in the source), published 0.1.
        decay: lambda of beta = log(lambda / layer + 1), published 0.5.
        layer: depth of this layer, from 1.

    Source: Chen et al., "Simple and Deep Graph Convolutional Networks", ICML 2020, eq. 5.
    """
    beta = math.log(decay / layer + 1)
    out = f.dtype
    with torch.autocast(f.device.type, enabled=False):
        A, f, g, weight = upcast(A, f, g, weight)
        smooth = _propagate(A, f, g, teleport=teleport, steps=1, square=square)
        return ((1 - beta) * smooth + beta * (smooth @ weight)).relu().to(out)


def _propagate(A: Tensor, f: Tensor, g: Tensor, *, teleport: float, steps: int, square: bool) -> Tensor:
    check_shapes(A, f, g)
    if steps < 1 or not 0 <= teleport <= 1:
        raise ValueError(f"steps {steps} must be at least 1 and teleport {teleport} within [0, 1]")
    if square and steps > 1 and A.shape[-2] != A.shape[-1]:
        raise ValueError(
            f"{steps} steps on a square graph need all nodes as rows, not {A.shape[-2]} of {A.shape[-1]}: use steps=1"
        )
    out = f.dtype
    with torch.autocast(f.device.type, enabled=False):
        A, f, g = upcast(A, f, g)
        total = A.sum(-1, keepdim=True)
        # A row without keys aggregates nothing; 0 / 1 keeps it and its gradient finite.
        P = A / torch.where(total > 0, total, 1.0)
        moved = P @ g
        for _ in range(steps - 1 if square else 0):
            moved = P @ ((1 - teleport) * moved + teleport * f)
        return ((1 - teleport) * moved + teleport * f).to(out)
