"""Calls of the p-Laplacian through Triton's interpreter and through the streaming form, for a process of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One call: graph, sizes and options, tensors drawn from a seed.

    Attributes:
        sizes: B, H, N, M, d, b.
        mask: None, or "keys" (B, 1, 1, M) bool, "empty row" (B, 1, N, M) bool with a row that keeps nothing, "added"
            (B, 1, N, M) numbers.
        equal: make two value nodes equal, and a third nearly so.
        dtype: of q and k.
    """

    graph: str
    sizes: tuple[int, int, int, int, int, int]
    p: Any = 1.5
    exact: bool = True
    causal: bool = False
    mask: str | None = None
    groups: int | None = None
    offset: int | None = None
    equal: bool = False
    dtype: torch.dtype = torch.float32
    tile: tuple[int, int] | None = (16, 16)
    wanted: tuple[str, ...] = field(default=("q", "k", "f", "g", "p", "mu"))


def errors(case: Case) -> dict[str, float]:
    """Largest error of U and each gradient, relative to its largest entry, against the streaming form in float64."""
    from mmpeft_ds.ops.p_laplacian_triton import usable

    q, k, f, g = tensors(case)
    assert usable(q, k, f.shape[-1], f.dtype)
    return distances(outcome(case, torch.float32), outcome(case, torch.float64))


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest error of each tensor, relative to its largest entry (at least 1e-3); nan where one is not finite."""
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - e).abs().max() / e.abs().max().clamp_min(1e-3)).item()
        if found[name].isfinite().all()
        else float("nan")
        for name, e in expected.items()
    }


def outcome(case: Case, dtype: torch.dtype, kernels: bool = True, moved: int = 0) -> dict[str, torch.Tensor]:
    """U and the wanted gradients; float64 goes by the streaming form, which the kernels leave alone.

    Args:
        moved: if not 0, a seed by which the inputs are moved as far as rounding to float32 may move them.
    """
    from mmpeft_ds.ops.p_laplacian_stream import p_laplacian_attention

    q, k, f, g = tensors(case)
    wide = dtype == torch.float64
    leaves = {
        "q": q.to(dtype if wide else case.dtype), "k": k.to(dtype if wide else case.dtype),
        "f": f.to(dtype), "g": g.to(dtype),
        "p": torch.tensor(case.p, dtype=dtype), "mu": torch.tensor(0.2, dtype=dtype),
    }  # fmt: skip
    if moved:
        draw = torch.Generator().manual_seed(moved)
        for leaf in leaves.values():
            leaf *= 1 + 2**-24 * (2 * torch.rand(leaf.shape, generator=draw, dtype=leaf.dtype) - 1)
    square = case.graph == "square"
    wanted = [n for n in case.wanted if not (square and n == "f")]
    for name in wanted:
        leaves[name].requires_grad_()
    first = (case.sizes[3] - case.sizes[2]) if case.offset is None else case.offset
    nodes = leaves["g"][:, :, first : first + case.sizes[2]] if square else leaves["f"]
    U = p_laplacian_attention(
        leaves["q"], leaves["k"], nodes, leaves["g"], leaves["p"], leaves["mu"], graph=case.graph, exact=case.exact,
        causal=case.causal, mask=mask(case), groups=case.groups, offset=case.offset, tile=case.tile, kernels=kernels,
    )  # fmt: skip
    weights = torch.randn(U.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad((U * weights).sum(), [leaves[n] for n in wanted])
    return {"U": U.detach(), **dict(zip(wanted, gradients, strict=True))}


def tensors(case: Case) -> tuple[torch.Tensor, ...]:
    """q, k in the case's dtype and f, g in float32."""
    B, H, N, M, d, b = case.sizes
    generator = torch.Generator().manual_seed(0)
    nodes = case.groups or M
    q, k, f, g = (torch.randn(B, H, *size, generator=generator) for size in ((N, d), (M, d), (N, b), (nodes, b)))
    if case.equal:
        g[:, :, 5] = g[:, :, 2]
        g[:, :, 7] = g[:, :, 2] + 1e-3
    return q.to(case.dtype), k.to(case.dtype), f, g


def mask(case: Case) -> torch.Tensor | None:
    """The case's mask."""
    B, _, N, M, _, _ = case.sizes
    if case.mask is None:
        return None
    keep = torch.rand(B, 1, 1 if case.mask == "keys" else N, M, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[..., 0] = True
    if case.mask == "empty row":
        keep[0, :, 2], keep[:, :, :, 1] = False, False
    return torch.zeros(keep.shape).masked_fill(~keep, -1e4) if case.mask == "added" else keep


def traffic(case: Case) -> list[tuple[str, int, int]]:
    """For every launch of a forward and backward pass: the kernel, the bytes its loads and stores named inside of the
    tensors, and those of the model."""
    from unittest import mock

    from triton.runtime.interpreter import InterpreterBuilder

    from mmpeft_ds.ops.p_laplacian_triton import launch

    counted, rows = [0], []
    load, store, run = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, launch.launch

    def counting_load(self, ptrs, mask, *rest):
        counted[0] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        counted[0] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *rest)

    def counting_launch(kernel, grid, tensors, options, blocks):
        counted[0] = 0
        run(kernel, grid, tensors, options, blocks)
        rows.append((kernel.__name__, counted[0], launch.described(kernel, grid, tensors, options).bytes()))

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
        mock.patch.object(launch, "launch", counting_launch),
    ):
        outcome(case, torch.float32)
    return rows
