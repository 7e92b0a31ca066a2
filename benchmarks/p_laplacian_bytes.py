#!/usr/bin/env python
"""Bytes and kernels of the p-Laplacian of attention on a GPU, counted, not measured: Triton kernels beside tiles.

    python benchmarks/p_laplacian_bytes.py                writes docs/benchmarks/p_laplacian_bytes.*
    python benchmarks/p_laplacian_bytes.py --out runs

Forward and backward, gradients of q, k, the nodes, p and mu. Nothing is computed: the tensors are on torch's meta
device, which takes the tile sizes of a GPU. Of the kernels the model of
mmpeft_ds/ops/p_laplacian_triton/traffic.py is counted, which tests compare with their loads and stores; of everything
torch itself does, in both forms, the bytes of all tensors that an operation reads and writes, views left out.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One attention: B, H, N, M, d, b, and the dtype of q and k."""

    name: str
    sizes: tuple[int, int, int, int, int, int]
    graph: str = "square"
    dtype: str = "float32"
    causal: bool = False
    exact: bool = True
    groups: int | None = None
    mask: bool = False


ROWS = [
    Row("BLIP text, self", (64, 12, 40, 40, 64, 8), causal=True),
    Row("BLIP text, cross, pooled to 16", (64, 12, 40, 197, 64, 8), "pooled", groups=16),
    Row("ViT-B", (64, 12, 197, 197, 64, 8)),
    Row("LLaVA-7B", (4, 32, 2048, 2048, 128, 16), dtype="bfloat16", causal=True),
    Row("LLaVA-7B, a mask for each pair", (4, 32, 2048, 2048, 128, 16), dtype="bfloat16", causal=True, mask=True),
    Row("LLaVA-7B, not causal", (4, 32, 2048, 2048, 128, 16), dtype="bfloat16"),
    Row("LLaVA-7B, exact: false", (4, 32, 2048, 2048, 128, 16), dtype="bfloat16", causal=True, exact=False),
    Row("LLaVA-7B in float32", (4, 32, 2048, 2048, 128, 16), causal=True),
    Row("LLaVA-7B in float32, not causal", (4, 32, 2048, 2048, 128, 16)),
    Row("published, full width", (4, 32, 2048, 2048, 128, 128), "published", dtype="bfloat16"),
]


def count(row: Row, kernels: bool) -> dict[str, float]:
    """Launches and GiB of one forward and backward pass."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from mmpeft_ds.ops import p_laplacian_stream
    from mmpeft_ds.ops.p_laplacian_triton import launch

    found = {"launches": 0, "triton": 0, "bytes": 0, "triton_bytes": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [x for x in _tensors(out)]
            if not func.is_view and made and func._schema.name not in FREE:
                found["launches"] += 1
                found["bytes"] += sum(_bytes(x) for x in [*_tensors(args), *made])
            return out

    def launched(kernel, grid, tensors, options, blocks):
        found["triton"] += 1
        found["triton_bytes"] += launch.described(kernel, grid, tensors, options).bytes()

    B, H, N, M, d, b = row.sizes
    dtype = getattr(torch, row.dtype)
    with torch.device("meta"):
        q, k = (torch.empty(B, H, n, d, dtype=dtype, requires_grad=True) for n in (N, M))
        f, g = (torch.empty(B, H, n, b, requires_grad=True) for n in (N, row.groups or M))
        p, mu = (torch.empty((), requires_grad=True) for _ in range(2))
        mask = torch.empty(B, 1, N, M, dtype=torch.bool) if row.mask else None
    usable = mock.patch.object(p_laplacian_stream, "usable", lambda *tensors: kernels)
    # autocast knows no meta device
    no_autocast = mock.patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    with usable, no_autocast, mock.patch.object(launch, "launch", launched), Count():
        U = p_laplacian_stream.p_laplacian_attention(
            q, k, g if row.graph == "square" else f, g, p, mu, graph=row.graph, causal=row.causal, exact=row.exact,
            groups=row.groups, mask=mask,
        )  # fmt: skip
        U.backward(torch.empty_like(U))
    return {
        "launches": found["launches"] + found["triton"], "triton": found["triton"],
        "gib": (found["bytes"] + found["triton_bytes"]) / GIB, "triton_gib": found["triton_bytes"] / GIB,
    }  # fmt: skip


FREE = {"aten::empty.memory_format", "aten::empty_like", "aten::new_empty", "aten::detach", "aten::empty"}


def _tensors(value) -> list:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    return [x for v in value for x in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _bytes(x) -> int:
    # An expanded tensor is read where it is.
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of page and JSON")
    args = parser.parse_args()
    rows = []
    for row in ROWS:
        rows.append({"row": row.name, "triton": count(row, True), "tiles": count(row, False)})
        print(rows[-1], flush=True)
    result = {"rows": rows}
    _page.write("p_laplacian_bytes", _table(result), result, args.out)


def _table(result: dict) -> str:
    lines = [
        "# p-Laplacian message passing on a GPU: bytes and kernels, by count",
        "",
        "One attention, forward and backward. Nothing here was run on a GPU, and nothing is a time.",
        "The Triton kernels are counted by a model of their blocks: every load and store that the code of a program",
        "names, as if there were no cache. Tests compare it with what Triton's interpreter loads and stores. Torch's",
        "operations are counted by the tensors that they read and write.",
        "`python benchmarks/p_laplacian_bytes.py` repeats it.",
        "",
        "| attention | B x H x N x M, d, b | q and k | tiles: kernels | tiles: GiB | Triton: kernels | Triton: GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, counted in zip(ROWS, result["rows"], strict=True):
        B, H, N, M, d, b = row.sizes
        triton, tiles = counted["triton"], counted["tiles"]
        lines.append(
            f"| {row.name} | {B} x {H} x {N} x {M}, {d}, {b} | {row.dtype} | {tiles['launches']:,} "
            f"| {tiles['gib']:,.1f} | {triton['launches']} ({triton['triton']} Triton) | {triton['gib']:,.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
