"""DeepSpeed and a process group on the stand-in for a GPU.

Collectives of tensors of the device are those of gloo on the same memory. As with NCCL nobody waits for them: whether
a program reads what came out is a report of its own.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from mmpeft_ds.distributed.processes import Ranks, environment
from tests.helpers.device import standin


def start(seed: int = 0) -> Ranks:
    """Join the group that the environment names, or make one of this process alone, with DeepSpeed on `cuda:0`."""
    standin.start()
    environment()
    import deepspeed
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class StandIn(CPU_Accelerator):
        """DeepSpeed's accelerator for the CPU, whose streams have nothing to order, under the GPU's name."""

        def device_name(self, device_index: int | None = None) -> str:
            return "cuda" if device_index is None else f"cuda:{device_index}"

        def device(self, device_index: int | None = None) -> torch.device:
            return torch.device("cuda", 0)

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return "cuda:0"

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.is_cuda

        def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
            return tensor

        def is_pinned(self, tensor: torch.Tensor) -> bool:
            return True

    real_accelerator.set_accelerator(StandIn())
    torch.cuda.Event = Event
    _collectives()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(seed)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Ranks(rank, size, rank, size, torch.device("cuda", 0))


class Event:
    """`torch.cuda.Event`, which torch without CUDA cannot make; the stand-in has done all work that is before it."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, ended: Event) -> float:
        """Milliseconds."""
        return 1000 * (ended.at - self.at)


def _collectives() -> None:
    library = torch.library.Library("c10d", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("c10d::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            library.impl(name, _on_host(standin.overload(name)), "CUDA")
    standin.keep(library)


def _on_host(op: torch._ops.OpOverload) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return op(*map(standin.to_host, args), **{name: standin.to_host(value) for name, value in kwargs.items()})

    return run
