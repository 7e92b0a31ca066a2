"""Message passing of p-Adapter: which graph an attention map gives, and the trained exponent and pull."""

# B batch, H heads, N query tokens, M value tokens, G pooled value tokens, b channels of a node

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.p_adapter.config import PAdapterConfig
from mmpeft_ds.methods.p_adapter.options import CLAMP
from mmpeft_ds.ops.p_laplacian import (
    attention_probabilities,
    p_laplacian,
    p_laplacian_published,
    pool_keys,
    self_loops,
)
from mmpeft_ds.ops.p_laplacian_branch import Exponent, Hidden, Scores, hidden_keys
from mmpeft_ds.ops.p_laplacian_map import HELD, MOST, fits, p_laplacian_of_map
from mmpeft_ds.ops.p_laplacian_stream import p_laplacian_attention
from mmpeft_ds.ops.p_laplacian_triton import usable
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.ops.propagation import appnp, gcn, gcnii
from mmpeft_ds.sites.observe import Observation
from mmpeft_ds.sites.once import once


class Propagation(nn.Module):
    """One step over the attention map of one adapter: nodes in, aggregated query nodes out.

    Its parameters are `p` and `m` (one element each), as far as the config trains them.

    Args:
        config: of the adapter.
        cross: the map is of cross-attention.
        channels: b, for the rule that has a weight of its own.
        layer: depth of the adapter, from 1.
    """

    def __init__(self, config: PAdapterConfig, cross: bool, channels: int, layer: int, **factory: object):
        super().__init__()
        self.rule, self.published = config.propagation, config.mode == "published"
        self.mu, self.layer = config.mu, layer
        self.clamp = config.clamps
        self.self_loops, self.kernel = config.self_loops, config.kernel
        self.groups = config.groups if cross and not self.published else None
        self.start = config.start_of_p(cross)
        self.p = self.m = self.weight = None
        if self.rule == "p_laplacian":
            if config.learnable_p:
                self.p = nn.Parameter(torch.empty(1, **factory))
            if not self.published:
                self.m = nn.Parameter(torch.empty(1, **factory))
        elif self.rule == "gcnii":
            self.weight = nn.Parameter(torch.empty(channels, channels, **factory))

    @torch.no_grad()
    def reset(self) -> None:
        """p as configured, m = 0, the weight of gcnii like every linear map of the adapter."""
        if self.p is not None:
            self.p.fill_(self.start)
        if self.m is not None:
            self.m.zero_()
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)

    @property
    def exponent(self) -> Tensor | float:
        """p as it is used."""
        if self.p is None:
            return self.start
        return _Clamp.apply(self.p, *CLAMP) if self.clamp else self.p

    @property
    def pull(self) -> Tensor | float:
        """mu as it is used; trained between one and three times the configured one."""
        return self.mu if self.m is None else self.mu * (2 + torch.tanh(self.m))

    def pool(self, values: Tensor) -> Tensor:
        """(B, M, d) -> (B, G, d) where this graph pools its keys."""
        return values if self.groups is None else pool_keys(values, self.groups, 1)

    def forward(self, seen: Observation, f: Tensor, g: Tensor, square: bool) -> Tensor:
        """(B, H, N, b) query nodes after the step.

        Args:
            seen: the attention module's forward.
            f: query nodes, (B, H, N, b); of a square graph the nodes of this forward's own tokens.
            g: value nodes, (B, H, M, b) or pooled (B, H, G, b).
            square: rows and columns are the same nodes.
        """
        if self._is_small(seen, (*f.shape[:-1], g.shape[2]), g.shape[-1], g):
            return p_laplacian_of_map(
                self.pooled(seen), None if square else f, g, self.exponent, self.pull, self_term=square, square=square
            )
        if self._streams(seen, square):
            graph = "published" if self.published else "square" if square else "pooled" if self.groups else "bipartite"
            scores = {"mask": seen.mask, "causal": seen.causal, "scaling": seen.scaling}
            key = seen.repeated(seen.key)
            return p_laplacian_attention(
                seen.query, key, f, g, self.exponent, self.pull, **scores, graph=graph, groups=self.groups,
                kernels=self.kernel == "auto",
            )  # fmt: skip
        A = self.attention(seen)
        if self.groups is not None:
            A = pool_keys(A, self.groups, -1)
        if square and self.self_loops == "drop":
            A = A.masked_fill(self_loops(*A.shape[-2:], None, A.device), 0.0)
        if self.published:
            return p_laplacian_published(A, f, g, self.exponent, self.pull)
        if self.rule == "p_laplacian":
            return p_laplacian(A, f, g, self.exponent, self.pull, self_term=square, square=square)
        if self.rule == "gcn":
            return gcn(A, f, g, square=square)
        if self.rule == "appnp":
            return appnp(A, f, g, square=square)
        return gcnii(A, f, g, self.weight, square=square, layer=self.layer)

    def joins(self, seen: Observation, x: Tensor, bottleneck: int) -> bool:
        """Whether `plus_branch` may take this step for the tokens `x`, (B, N, *), with nodes of their dtype.

        Args:
            bottleneck: H b.
        """
        if self.m is None or seen.value.dtype != x.dtype:
            return False
        heads = (seen.value if seen.query is None else seen.query).shape[1]
        columns = self.groups or seen.value.shape[2]
        return self._is_small(seen, (x.shape[0], heads, x.shape[1], columns), bottleneck // heads, x)

    def given(self, seen: Observation, dtype: torch.dtype) -> Tensor | Scores:
        """The map as `plus_branch` takes it, for nodes of that dtype."""
        scored = seen.probabilities is None and self.groups is None and seen.query.dtype == dtype
        if scored and (seen.mask is None or not seen.mask.requires_grad):
            return Scores(seen.query, seen.repeated(seen.key), self._hidden(seen), seen.scaling)
        return self.pooled(seen)

    @staticmethod
    def _hidden(seen: Observation) -> Hidden:
        """Keys that the mask hides, once a forward for all layers that are given the same mask."""
        mask, shape, dtype = seen.mask, (*seen.query.shape[:3], seen.key.shape[2]), seen.query.dtype
        owner = ("hidden keys", id(mask), seen.causal, shape, dtype)
        make = lambda: hidden_keys(mask, seen.causal, shape, dtype)  # noqa: E731
        return once(owner, 0, lambda: (make(), mask), make)  # and the mask, so that no other gets its id

    @property
    def trained(self) -> Exponent:
        """p and m as `plus_branch` takes them."""
        return Exponent(self.start if self.p is None else self.p, self.m, self.mu, CLAMP if self.clamp else None)

    def pooled(self, seen: Observation) -> Tensor:
        """The map that the step goes over, (B, H, N, M) or with bins (B, H, N, G)."""
        A = self.attention(seen)
        return A if self.groups is None else pool_keys(A, self.groups, -1)

    def _is_small(self, seen: Observation, shape: tuple[int, ...], channels: int, like: Tensor) -> bool:
        """Whether the map is at hand or may be made, and what belongs to each of its edges may be held.

        Args:
            shape: of the map that the step goes over, (B, H, N, G).
            channels: b.
            like: has the dtype and device of nodes.
        """
        if self.rule != "p_laplacian" or self.published or self.kernel != "auto" or self.self_loops == "drop":
            return False
        A, query = seen.probabilities, seen.query
        if query is not None and usable(query, seen.key, channels, like.dtype):
            return False
        if A is None:
            made = (*query.shape[:-1], seen.key.shape[2])
            if full_dtype(query.dtype) != like.dtype or math.prod(made) * HELD > MOST:
                return False
        elif A.dtype != like.dtype:
            return False
        return fits(shape, channels, like)

    def _streams(self, seen: Observation, square: bool) -> bool:
        """Whether the step works from queries and keys. Measured, that is faster at any length (docs/methods)."""
        if self.rule != "p_laplacian" or self.kernel == "dense" or seen.query is None:
            return False
        return not (square and self.self_loops == "drop")

    @staticmethod
    def attention(seen: Observation) -> Tensor:
        """(B, H, N, M) probabilities after masks and before dropout, at least float32 unless the module made them."""
        if seen.probabilities is not None:
            return seen.probabilities
        return attention_probabilities(
            seen.query, seen.repeated(seen.key), seen.mask, causal=seen.causal, scaling=seen.scaling
        )


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient still passes where a descent step leads back inside."""

    @staticmethod
    def forward(ctx, p: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(p)
        ctx.bounds = low, high
        return p.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (p,), (low, high) = ctx.saved_tensors, ctx.bounds
        if p.device.type == "cpu":  # one number, which is there to be read
            value, slope = float(p), float(grad)
            blocked = (value <= low and slope > 0) or (value >= high and slope < 0)
            return torch.zeros_like(grad) if blocked else grad, None, None
        outwards = ((p <= low) & (grad > 0)) | ((p >= high) & (grad < 0))
        return grad.masked_fill(outwards, 0.0), None, None


def check_published(causal: bool, tower: str) -> None:
    """Refuse the paper's equations where they would look ahead. Raises BadInput."""
    if causal:
        raise BadInput(
            f"mode: published divides by what all queries attend to, so in the causal tower {tower!r} a token would "
            "see its future, also through cross-attention. Use mode: released."
        )
