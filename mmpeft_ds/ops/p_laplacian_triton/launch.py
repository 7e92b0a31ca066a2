"""Arguments, block sizes and grids of the p-Laplacian kernels."""

# B batch, H heads, N query tokens, M key tokens, G pooled key tokens, d width of a head, b channels of a node

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmpeft_ds.ops.p_laplacian import bins, inverse_root
from mmpeft_ds.ops.p_laplacian_edges import Gradients, Nodes, Options
from mmpeft_ds.ops.p_laplacian_triton import backward, forward
from mmpeft_ds.ops.p_laplacian_triton.tiles import ADDED, KEEP, KEEP_KEYS, NO_MASK
from mmpeft_ds.ops.p_laplacian_triton.traffic import Launch

ROOMY = 160 * 1024  # shared memory of a program on cards of data centres; others have about 100 KiB
LEAST = 16  # rows, columns and channels of a matrix product on tensor cores


class Blocks(NamedTuple):
    """Tile and warps of a program: it keeps `own` rows (or columns) and runs over `moving` columns (or rows), of which
    so many tiles are on the chip as it has stages."""

    own: int
    moving: int
    warps: int
    stages: int = 3


def block_sizes(
    width: int, channels: int, item: int, tile: tuple[int, int] | None = None, shared: int = ROOMY, sums: int = 1
) -> Blocks:
    """Tile for heads of `width`, `item` bytes an element, and nodes of `channels`.

    Larger ones read less and need more registers and shared memory. These were chosen by what the compiler reports for
    compute capability 8.0 and 9.0 (docs/benchmarks/p_laplacian_bytes.md), not by time.

    Args:
        tile: own and moving, raised to powers of two of at least 16.
        shared: bytes of shared memory that a program may have.
        sums: that a kernel keeps for its block, as wide as a head.
    """
    if tile is not None:
        return Blocks(padded(tile[0]), padded(tile[1]), 4)
    if shared < ROOMY:
        return Blocks(32, 32, 4)
    if padded(width) + padded(channels) > 160:
        return Blocks(64, 32, 8)
    narrow = padded(width) * item <= 256
    if sums > narrow:
        return Blocks(64, 64, 8)
    return Blocks(128, 32, 8, stages=3 if narrow else 2)


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return ROOMY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def padded(width: int) -> int:
    """The power of two, at least 16, that holds `width` channels in a kernel."""
    return max(LEAST, triton.next_power_of_2(width))


def launch(kernel, grid: tuple[int, int], tensors: tuple[Tensor, ...], options: dict, blocks: Blocks) -> None:
    """Run a kernel; the one place that does, so that what is launched can be counted."""
    kernel[grid](*tensors, **options, num_warps=blocks.warps, num_stages=blocks.stages)


def described(kernel, grid: tuple[int, int], tensors: tuple[Tensor, ...], options: dict) -> Launch:
    """Arguments of `launch`, for counting its bytes."""
    q, _, mask = tensors[:3]
    name = kernel.__name__
    return Launch(name, "column" in name, grid[1], options, q.element_size(), mask.element_size())


class Launcher(Nodes):
    """One call's inputs as the kernels read them.

    Args:
        q, k, f, g, p, mu, mask, options: as given to `p_laplacian_attention`, p and mu as () or (H, 1, 1).
    """

    def __init__(self, q, k, f, g, p, mu, mask, options: Options):
        super().__init__(f.float(), g.float(), p, mu, options)
        common = torch.promote_types(q.dtype, k.dtype)
        self.q, self.k = q.to(common).contiguous(), k.to(common).contiguous()
        (self.batch, self.heads, self.rows, self.width), self.columns = q.shape, k.shape[-2]
        same = self.square and self.rows == self.columns  # nodes: then f is g
        self.f_T = self.g_T if same else self.f.mT.contiguous()
        self.channels = f.shape[-1]
        self.p_H, self.c_H = (x.expand(self.heads, 1, 1).reshape(-1).contiguous() for x in (self.p, self.c))
        self._sizes = (self.width, self.channels, self.q.element_size(), options.tile, _shared_memory(q.device))
        self.pooled = options.graph == "pooled"
        self._mask(mask)

    def row_lse(self) -> Tensor:
        """Log-sum-exp of the scores in two parts, (B, H, N, 2)."""
        lse = self._empty(self.rows, 2)
        self._run(forward.row_lse, self.rows, self.q, self.k, self.mask, lse, sums=0, **self._scores())
        return lse

    def column_sums(self, lse: Tensor) -> Tensor:
        """sum_i A_ij, (B, H, M, 1)."""
        degree = self._empty(self.columns, 1)
        self._run(forward.column_sums, -self.columns, self.q, self.k, self.mask, lse, degree, sums=0, **self._scores())
        return degree

    def divide(self, degree: Tensor) -> None:
        """Value nodes of a published graph, divided by the root of their column sums."""
        self.g_T = self.g_T * inverse_root(degree).mT

    def pooled_map(self, lse: Tensor) -> Tensor:
        """Mean probability of each bin of keys, (B, H, N, G)."""
        groups = self.options.groups
        pooled = self._empty(self.rows, groups)
        averages = bins(self.columns, groups, pooled)
        self._run(
            forward.pooled_map, self.rows, self.q, self.k, self.mask, lse, averages, pooled,
            **self._scores(), G=groups, BG=padded(groups),
        )  # fmt: skip
        return pooled

    def messages(self, lse: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """V (B, H, N, b): U, less f on a square graph; alpha and the weights of the self loops, (B, H, N, 1)."""
        V, alpha, own = self._empty(self.rows, self.channels), self._empty(self.rows, 1), self._empty(self.rows, 1)
        self._run(
            forward.messages, self.rows, self.q, self.k, self.mask, lse, lse if pooled is None else pooled,
            self.f_T, self.g_T, self.p_H, self.c_H, V, alpha, own,
            sums=0, **self._edges(), SELF_TERM=self.options.self_term,
        )  # fmt: skip
        return V, alpha, own

    def edge_gradients(self, grads: Gradients, lse: Tensor, pooled: Tensor | None, E: Tensor | None, scores: bool):
        """Add what all edges give to df, dg and dp of `grads`.

        Args:
            E: sum_k A_ik dA_ik, (B, H, N, 1), where it is known beforehand.
            scores: gradients of q and k are wanted.

        Returns:
            dq and dk, or None without `scores` and on a pooled graph; E; the gradient of the pooled map, or None.
        """
        direct = scores and not self.pooled
        E = self._empty(self.rows, 1) if E is None else E.contiguous()
        moved = self._empty(self.rows, self.channels)
        sums = direct * (1 + self.options.exact)
        powers = self._empty(triton.cdiv(self.rows, block_sizes(*self._sizes, sums).own), 1)
        dg_T = torch.empty_like(self.g_T)
        dq = self._empty(self.rows, self.width) if direct else E
        dk = self._empty(self.columns, self.width) if direct else E
        d_pooled = None if pooled is None else torch.empty_like(pooled)
        log_least = grads.log_least.expand(self.heads, 1, 1).reshape(-1).contiguous()
        read = (
            self.q, self.k, self.mask, lse, lse if pooled is None else pooled, self.f_T, self.g_T, self.p_H, log_least,
            grads.alpha_dU.contiguous(), grads.alpha_level.contiguous(), grads.own_dw.contiguous(), E,
        )  # fmt: skip
        given = (moved, powers, dq, E if d_pooled is None else d_pooled)
        edges = {**self._edges(), "SCORES": direct}
        self._run(backward.edge_rows, self.rows, *read, *given, sums=sums, **edges)
        columns = self.options.groups if self.pooled else self.columns
        self._run(backward.edge_columns, -columns, *read, dg_T, dk, **edges)
        grads.df -= moved
        grads.dg_T = dg_T
        grads.dp += powers.sum(-2, keepdim=True).sum_to_size(self.p.shape)
        return (dq if direct else None), (dk if direct else None), E, d_pooled

    def map_gradients(
        self, lse: Tensor, left: Tensor | None, right: Tensor, E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """dq and dk of a gradient of the attention map that is `left` (B, H, N, R) times `right` (M, R), with E known,
        or `right` (B, H, M, 1) in every row."""
        rank = 0 if left is None else left.shape[-1]
        E = self._empty(self.rows, 1) if E is None else E
        left = right if left is None else left
        dq, dk = self._empty(self.rows, self.width), self._empty(self.columns, self.width)
        read = (self.q, self.k, self.mask, lse, left, right.contiguous(), E)
        options = {**self._scores(), "R": rank, "BR": padded(rank)}
        self._run(backward.map_rows, self.rows, *read, dq, **options)
        self._run(backward.map_columns, -self.columns, *read, dk, **options)
        return dq, dk

    def _run(self, kernel, length: int, *tensors: Tensor, sums: int = 1, **options) -> None:
        """One program for each block of `length` rows, or columns where it is negative, and each head."""
        blocks = block_sizes(*self._sizes, sums)
        grid = (triton.cdiv(abs(length), blocks.own), self.batch * self.heads)
        options.update(zip("nm" if length > 0 else "mn", blocks[:2], strict=True))
        launch(kernel, grid, tensors, options, blocks)

    def _scores(self) -> dict:
        """Arguments that every kernel takes."""
        batch, head, row, column = self.mask_strides
        return {
            "N": self.rows, "M": self.columns, "H": self.heads, "offset": self.options.offset,
            "scaling": self.options.scaling, "mask_batch": batch, "mask_head": head, "mask_row": row,
            "mask_column": column, "D": self.width, "BD": padded(self.width), "CAUSAL": self.options.causal,
            "MASK": self.mask_kind,
        }  # fmt: skip

    def _edges(self) -> dict:
        """Arguments of the kernels that look at edges; those of a pooled graph are between rows and bins."""
        options = {
            **self._scores(), "least": self.least, "eps": self.options.eps, "B": self.channels,
            "BB": padded(self.channels), "SQUARE": self.square, "EXACT": self.options.exact, "POOLED": self.pooled,
        }  # fmt: skip
        return {**options, "M": self.options.groups, "CAUSAL": False} if self.pooled else options

    def _mask(self, mask: Tensor | None) -> None:
        """The mask with its strides over (B, H, N, M), 0 where it is broadcast."""
        self.mask, self.mask_kind, self.mask_strides = self.q, NO_MASK.value, (0, 0, 0, 0)
        if mask is None:
            return
        boolean = mask.dtype == torch.bool
        mask = mask.expand(self.batch, self.heads, self.rows, self.columns)
        self.mask_strides = mask.stride()
        self.mask_kind = ADDED.value if not boolean else KEEP.value if self.mask_strides[2] else KEEP_KEYS.value
        self.mask = mask.view(torch.uint8) if boolean else mask

    def _empty(self, length: int, channels: int) -> Tensor:
        return self.f.new_empty(self.batch, self.heads, length, channels)
