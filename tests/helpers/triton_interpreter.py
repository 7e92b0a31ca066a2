"""Triton kernels on a CPU: a process of their own that runs them in Triton's interpreter.

Whether kernels are interpreted is decided when Triton is first imported, so the process that runs the tests stays as
it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import ModuleType


@contextlib.contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """An executor of one process; functions submitted to it stand in importable modules, such as this folder's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin) as executor:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            executor.submit(os.getpid).result()
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
        yield executor


def _begin() -> None:
    """Let a kernel that calls functions of one module many times prepare that module once.

    For every call Triton's interpreter replaces the operators again, which takes longer than the arithmetic.
    """
    import torch
    from triton.runtime import interpreter as triton_interpreter

    torch.set_num_threads(1)
    function, executor = triton_interpreter.InterpretedFunction, triton_interpreter.GridExecutor
    call, launch, ready = function.__call__, executor.__call__, set()

    def called(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module in ready:
            return self.rewrite()(*args, **kwargs)
        out = call(self, *args, **kwargs)
        ready.add(module)
        return out

    def launched(self, *args, **kwargs):
        ready.clear()
        return launch(self, *args, **kwargs)

    function.__call__, executor.__call__ = called, launched
    _multiply_bfloat16(triton_interpreter)


def _multiply_bfloat16(triton_interpreter: ModuleType) -> None:
    """Triton 3.7.1's interpreter keeps bfloat16 as its bits, and its matrix product multiplies these as integers."""
    import numpy as np
    import triton.language as tl

    builder, handle = triton_interpreter.InterpreterBuilder, triton_interpreter.TensorHandle
    dot = builder.create_dot

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = triton_interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return handle(data, tl.float32)

    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
