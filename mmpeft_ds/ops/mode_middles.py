"""What stands between the bottlenecks of mode updates, `mode_product`, of many maps at once."""

# R rank, K modes of one map, T of all maps together

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mode_middles(core: Tensor, modes: Sequence[Tensor], roles: Sequence[str]) -> tuple[Tensor, ...]:
    """The matrix of each map, such that `x down^T middle up^T`, as `middle_sum` has it, is `mode_delta` (its modes
    side by side), `widening_delta` or `narrowing_delta`.

    One product with the core gives all of them, and one its gradient: beside a small map each takes as long as the
    products of the map.

    Args:
        core: (R, R, R).
        modes: (R, K) of each map.
        roles: `attention`, `widen` or `narrow` of each map.

    Returns:
        (R, K R) of each map, (K R, R) for `narrow`. A second derivative is refused. The modes of a map that got no
        gradient get none.

    Source: as `mode_product`.
    """
    return _Middles.apply(core, tuple(roles), *modes)


class _Middles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Tensor, roles: tuple[str, ...], *modes: Tensor) -> tuple[Tensor, ...]:
        # Not by `save_for_backward`: two losses of one forward may each have a backward pass of their own, through
        # maps that have nothing else in common.
        ctx.core, ctx.roles, ctx.modes = core, roles, modes
        ctx.set_materialize_grads(False)
        rank = core.shape[0]
        slices = torch.cat(modes, 1).T @ core.view(-1, rank).T
        sizes = [mode.shape[1] for mode in modes]
        each = slices.view(-1, rank, rank).split(sizes)
        return tuple(_laid_out(of_map, role) for of_map, role in zip(each, roles, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        rank, gradients = ctx.core.shape[0], [None] * len(given)
        used = [i for i, gradient in enumerate(given) if gradient is not None]
        modes = [ctx.modes[i] for i in used]
        slices = torch.cat([_slices(given[i], ctx.roles[i]) for i in used]).view(-1, rank * rank)
        of_core = (slices.T @ torch.cat(modes, 1).T).view(ctx.core.shape) if ctx.needs_input_grad[0] else None
        of_modes = slices @ ctx.core.view(-1, rank)
        for i, of_map in zip(used, of_modes.split([mode.shape[1] for mode in modes]), strict=True):
            gradients[i] = of_map.T
        return of_core, None, *gradients


def _laid_out(slices_KRR: Tensor, role: str) -> Tensor:
    """The slices of one map as its matrix; see `mode_product` for the layouts."""
    rank = slices_KRR.shape[1]
    if role == "narrow":
        return slices_KRR.permute(2, 0, 1).reshape(-1, rank)
    return slices_KRR.permute((1, 0, 2) if role == "attention" else (1, 2, 0)).reshape(rank, -1)


def _slices(middle: Tensor, role: str) -> Tensor:
    """The other way: (K, R, R)."""
    rank = min(middle.shape)
    if role == "narrow":
        return middle.view(rank, -1, rank).permute(1, 2, 0)
    if role == "attention":
        return middle.view(rank, -1, rank).transpose(0, 1)
    return middle.view(rank, rank, -1).permute(2, 0, 1)
