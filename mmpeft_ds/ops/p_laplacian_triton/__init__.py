"""p-Laplacian message passing in Triton kernels: the streaming form on a GPU, a few kernels in place of thousands.

`tiles` holds what a kernel does with one tile, `forward` and `backward` the kernels, `launch` their arguments and
grids, `traffic` the bytes that they move, `function` the autograd function. `usable` says where they run. Importing
this package alone does not import Triton.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

MAX_BYTES = 512  # of one row of a head or a node: a block of rows has to stay on the chip
MAX_HEADS = 65535  # B H, the second axis of a grid
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(q: Tensor, k: Tensor, channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take these tensors on their device, with nodes of so many channels in `dtype`.

    They run on NVIDIA cards from compute capability 8.0 (Ampere), and anywhere under Triton's interpreter, which the
    environment variable TRITON_INTERPRET=1 turns on before Triton is first imported.
    """
    # Nodes are float32 inside.
    wide = max(q.shape[-1] * max(q.element_size(), k.element_size()), 4 * channels) > MAX_BYTES
    fits = not wide and all(t.dtype in DTYPES and t.numel() for t in (q, k)) and dtype in DTYPES and channels > 0
    if not fits or q.shape[0] * q.shape[1] > MAX_HEADS or not _installed():
        return False
    return _interpreted() or (q.device.type == "cuda" and _card_is_known())


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _card_is_known() -> bool:
    import triton

    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no driver
        return False
    return target.backend == "cuda" and int(target.arch) >= 80
