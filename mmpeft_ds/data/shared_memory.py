"""Shared memory in which large tensors travel from a worker, used again once the receiver has let go of them.

torch makes a shared file for each tensor: the kernel clears it, both sides map it, and for its descriptor the receiver
connects to the worker. A buffer here is made, cleared and mapped once. It has no name, so nothing is left of a process
that is killed, and the size of /dev/shm does not bound it. Its first byte says whether a tensor of the receiver uses
what follows.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FREE, LENT = 0, 1
HEAD = 64  # bytes before the numbers, which begin at a multiple of a cache line
MOST = 64  # buffers of one worker; more are wanted only where a caller keeps many tensors
FILES = 2  # that a worker keeps open for each

# Buffers that this process has received: (process that made it, its descriptor there, its number) -> bytes.
_RECEIVED: dict[Handle, np.ndarray] = {}
Handle = tuple[int, int, int]


@dataclass
class _Buffer:
    """Bytes of one buffer, and how the receiver finds it."""

    handle: Handle
    memory: np.ndarray

    @property
    def room(self) -> int:
        return len(self.memory) - HEAD

    @property
    def free(self) -> bool:
        return self.memory[0] == FREE


class Sender:
    """The buffers of one worker.

    Args:
        receiver: id of the process that gets the tensors. Where the system hides processes from each other nothing is
            sent this way.

    Attributes:
        possible: whether anything is.
    """

    def __init__(self, receiver: int):
        self._buffers: list[_Buffer] = []
        self._made = 0
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # An eighth of the files that may be open; what the worker does needs the others.
        self._most = MOST if allowed == resource.RLIM_INFINITY else min(MOST, allowed // (8 * FILES))
        self.possible = hasattr(os, "memfd_create") and os.access(f"/proc/{receiver}/fd", os.R_OK | os.X_OK)

    def lend(self, tensor: Tensor) -> tuple | None:
        """Arguments of `received` for a copy of a contiguous CPU tensor; None where there is no memory for it, or
        where all buffers are lent."""
        if not self.possible or (
            len(self._buffers) >= self._most and not any(buffer.free for buffer in self._buffers)
        ):
            return None
        gone: list[Handle] = []
        try:
            buffer = self._buffer_of(tensor.nbytes, gone)
        except OSError:
            return None
        target = torch.from_numpy(buffer.memory[HEAD : HEAD + tensor.nbytes])
        target.copy_(tensor.reshape(-1).view(torch.uint8))
        buffer.memory[0] = LENT
        return buffer.handle, gone, tensor.dtype, tensor.shape

    def _buffer_of(self, size: int, gone: list[Handle]) -> _Buffer:
        """The smallest free buffer with room for `size` bytes. Where there is none, a new one takes the place of the
        largest free one, which goes to `gone`. Raises OSError."""
        free = sorted((buffer for buffer in self._buffers if buffer.free), key=lambda buffer: buffer.room)
        for buffer in free:
            if buffer.room >= size:
                return buffer
        made = self._new(size)
        if free:
            self._buffers.remove(free[-1])
            os.close(free[-1].handle[1])
            gone.append(free[-1].handle)
        self._buffers.append(made)
        return made

    def _new(self, size: int) -> _Buffer:
        total = HEAD + size + size // 8  # batches of about this size are to fit as well
        file = os.memfd_create("mmpeft-batch")
        try:
            os.posix_fallocate(file, 0, total)  # now, and not by a signal while it is written
            memory = np.frombuffer(mmap.mmap(file, total), np.uint8)
        except OSError:
            os.close(file)
            raise
        self._made += 1
        return _Buffer((os.getpid(), file, self._made), memory)


def received(handle: Handle, gone: list[Handle], dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """The tensor that a worker has lent; the buffer is free again when nothing uses the tensor's storage any more.

    Raises:
        RuntimeError: the worker has ended, in the words of torch's loader, which may not have seen it yet.
    """
    for old in gone:
        _RECEIVED.pop(old, None)
    if handle not in _RECEIVED:
        process, file, _ = handle
        try:
            with open(f"/proc/{process}/fd/{file}", "r+b", buffering=0) as opened:
                _RECEIVED[handle] = np.frombuffer(mmap.mmap(opened.fileno(), 0), np.uint8)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise RuntimeError(f"DataLoader worker (pid {process}) ended with a batch on its way") from error
    memory = _RECEIVED[handle]
    numbers = memory[HEAD : HEAD + shape.numel() * dtype.itemsize]
    # torch holds this very array as long as the storage lives. At exit there is nobody to give it back to.
    weakref.finalize(numbers, _give_back, memory, os.getpid()).atexit = False
    return torch.from_numpy(numbers).view(dtype).view(shape)


def forget(process: int) -> None:
    """Unmap the buffers of a worker that has ended, as far as no tensor uses them."""
    for handle in [handle for handle in list(_RECEIVED) if handle[0] == process]:
        with contextlib.suppress(KeyError):
            del _RECEIVED[handle]


def _give_back(memory: np.ndarray, process: int) -> None:
    if os.getpid() == process:  # a child of the receiver has copies, which it may drop earlier
        memory[0] = FREE
