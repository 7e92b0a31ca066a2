"""Routing functions: how an image feature steers the low-rank bottleneck of a text layer, without parameters."""

# B batch, L text length, m conditioning tokens, r width of the bottleneck, d model width

from __future__ import annotations

import torch
from torch import Tensor

ROUTES = ("none", "mul", "add", "matmul1", "matmul2", "matmul1_relu", "xtxt", "ones")
# These mix text tokens without a mask, so a causal decoder would see its future.
MIXES_TOKENS = ("xtxt",)


def route(kind: str, h_BLr: Tensor, v_Bmr: Tensor | None, *, reshape_compat: bool = False) -> Tensor:
    """Combine the bottleneck of the text with the bottleneck of the condition.

    `none` z = h; `mul` z = h * v; `add` z = h + v; `matmul1` z = h V^T V; `matmul2` z_i = (sum_k h_ik) v;
    `matmul1_relu` z = relu(h) relu(V)^T V; `xtxt` z = h h^T V with V one row per token; `ones` z = h V^T 1.

    Args:
        kind: one of `ROUTES`.
        h_BLr: bottleneck of the text.
        v_Bmr: bottleneck of the condition; ignored by `none`. m is 1 or L for `mul`, `add`, `xtxt`; 1 or r for
            `matmul2`; any for the others.
        reshape_compat: replace each transpose by a re-reading of the same memory as (B, r, n), as published results
            did. It equals the transpose for n = 1 only.

    Returns:
        (B, L, r), in the wider dtype of the two; half precision is computed in float32 and returned as it came.

    Raises:
        ValueError: unknown kind, no condition, unequal widths, rows or a number of conditioning tokens that the kind
            cannot take.

    Source: Qu, Tuytelaars, Moens, ECCV 2024, arXiv 2403.09377.
    """
    if kind == "none":
        return h_BLr
    _check(kind, h_BLr, v_Bmr)
    dtype = torch.promote_types(h_BLr.dtype, v_Bmr.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(h_BLr.device.type, enabled=False):
            return route(kind, h_BLr.float(), v_Bmr.float(), reshape_compat=reshape_compat).to(dtype)
    h, v = h_BLr, v_Bmr
    pooled = v.shape[1] == 1
    if kind == "mul":
        return h * v
    if kind == "add":
        return h + v
    if kind == "matmul2":
        # X repeats v in all its r rows, so of h only the sum over the bottleneck survives.
        return h.sum(-1, keepdim=True) * v if pooled else h @ v
    if kind == "xtxt":
        return (h @ _swap(h, reshape_compat)) @ v.expand_as(h)
    if kind == "ones":
        return (h @ _swap(v, reshape_compat).sum(-1, keepdim=True)).expand_as(h)
    left, inner = (h.relu(), v.relu()) if kind == "matmul1_relu" else (h, v)
    if pooled:
        return (left * inner).sum(-1, keepdim=True) * v
    return (left @ _swap(inner, reshape_compat)) @ v


def pool_condition(y_Bmd: Tensor, mask_Bm: Tensor | None = None, how: str = "mean") -> Tensor:
    """Conditioning tokens that a layer routes on.

    Args:
        y_Bmd: tokens.
        mask_Bm: True (or nonzero) = keep; None keeps all. Only `mean` uses it.
        how: `mean` of the kept tokens, 1.0 where a row keeps none; `first`; or `all`.

    Returns:
        (B, 1, d), or (B, m, d) for `all`.

    Raises:
        ValueError: unknown `how` or a mask of another shape.
    """
    if how == "all":
        return y_Bmd
    if how == "first":
        return y_Bmd[:, :1]
    if how != "mean":
        raise ValueError(f"unknown pooling {how!r}; known: mean, first, all")
    if mask_Bm is None:
        return y_Bmd.mean(1, keepdim=True)
    if mask_Bm.shape != y_Bmd.shape[:2]:
        raise ValueError(f"mask of shape {tuple(mask_Bm.shape)} for tokens of shape {tuple(y_Bmd.shape)}")
    keep = mask_Bm.bool().unsqueeze(-1)
    count = keep.sum(1, keepdim=True)
    # where, not a product: a dropped token may be inf or nan
    total = torch.where(keep, y_Bmd, 0).sum(1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0).to(y_Bmd.dtype)


def _swap(t_Bnr: Tensor, reshape_compat: bool) -> Tensor:
    """(B, n, r) -> (B, r, n): the transpose, or the same memory read in the new shape."""
    batch, n, r = t_Bnr.shape
    return t_Bnr.reshape(batch, r, n) if reshape_compat else t_Bnr.transpose(1, 2)


def _check(kind: str, h: Tensor, v: Tensor | None) -> None:
    if kind not in ROUTES:
        raise ValueError(f"unknown route {kind!r}; known: {', '.join(ROUTES)}")
    if v is None:
        raise ValueError(f"route {kind!r} needs a condition")
    if h.dim() != 3 or v.dim() != 3:
        raise ValueError(f"route {kind!r} takes (B, L, r) and (B, m, r), got {tuple(h.shape)} and {tuple(v.shape)}")
    if h.shape[0] != v.shape[0] or h.shape[2] != v.shape[2]:
        raise ValueError(f"route {kind!r}: batch or width differ: {tuple(h.shape)} and {tuple(v.shape)}")
    length, r, m = h.shape[1], h.shape[2], v.shape[1]
    allowed = {"mul": {1, length}, "add": {1, length}, "xtxt": {1, length}, "matmul2": {1, r}}.get(kind, {m})
    if m not in allowed:
        numbers = " or ".join(str(n) for n in sorted(allowed))
        raise ValueError(f"route {kind!r} takes {numbers} conditioning tokens here, got {m}; pool the condition")
