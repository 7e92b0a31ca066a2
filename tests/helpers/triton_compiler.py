"""Compilation of launches of the p-Laplacian kernels for cards that are not here."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}


def launches(call: Any) -> list[tuple[Any, tuple[torch.Tensor, ...], dict[str, Any], Any]]:
    """Kernel, tensors, options and blocks of every launch of `call()`, which launches nothing."""
    from mmpeft_ds.ops import p_laplacian_stream
    from mmpeft_ds.ops.p_laplacian_triton import launch

    made = []

    def note(kernel, grid, tensors, options, blocks):
        made.append((kernel, tensors, dict(options), blocks))

    with (
        mock.patch.object(launch, "launch", note),
        mock.patch.object(p_laplacian_stream, "usable", lambda *tensors: True),
    ):
        call()
    return made


def compiled(launch: tuple[Any, tuple[torch.Tensor, ...], dict[str, Any], Any], capability: int) -> Any:
    """The compiled kernel, down to the machine code of a card of this compute capability (80 for 8.0)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, tensors, options, blocks = launch
    given = {**dict(zip(kernel.arg_names, tensors, strict=False)), **options}
    types, constants = {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
        else:
            types[name] = "i32" if isinstance(value, int) else "fp32"
    source, chosen = ASTSource(kernel, types, constants), {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)
