"""A CUDA device in host memory: tensors that say `cuda:0` and hold real values, for a build of torch without CUDA.

A tensor of the stand-in is a real one: dispatch key CUDA, a storage with an address, hooks, `.data`, autograd in its
own device thread, as on a GPU. Its kernels are those of the CPU, called on the same memory under the CPU's name.
`reports.watching` says what such a program would make a GPU wait for.

It cannot be taken back, and autograd counts devices at its first backward: only for a process of its own that has run
no backward yet, such as one of `launch.run_forked`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.device import reports

SOURCE = Path(__file__).with_name("device_guard.cpp")
_KEYS = {"CPU": "CUDA", "SparseCPU": "SparseCUDA", "SparseCsrCPU": "SparseCsrCUDA"}
_DLPACK_CPU, _DLPACK_CUDA = 1, 2
_FLASH = 1  # SDPBackend
# Composite, but their code asks which device it is on and has kernels for CPU and CUDA only.
_ASK_FOR_THE_DEVICE = ("convolution", "convolution_backward")

_started: list[Any] = []
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def start() -> None:
    """Make `cuda:0` usable in this process.

    Raises:
        RuntimeError: this build of torch has CUDA.
    """
    if _started:
        return
    if torch.version.cuda:
        raise RuntimeError("torch is built with CUDA here: its own kernels would answer, or fail without a GPU")
    guard = ctypes.CDLL(str(compiled()))
    guard.install()
    torch.cuda._lazy_init = lambda: None
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    libraries = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
    for key in _KEYS.values():
        libraries[0].fallback(lambda op, *args, **kwargs: _kernel(op)(*args, **kwargs), key)
    own = {"aten::copy_": _copy, "aten::resize_": _resize}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        for host, device in _KEYS.items():
            if name.startswith("aten::") and name not in own and has_kernel(name, host):
                libraries[1].impl(name, _kernel(overload(name)), device)
    for name in _ASK_FOR_THE_DEVICE:
        libraries[1].impl(name, _kernel(overload(f"aten::{name}")), "CUDA")
    for name, kernel in own.items():
        libraries[1].impl(name, kernel, "CUDA")
    for key in ("CUDA", "AutogradCUDA"):
        libraries[1].impl("scaled_dot_product_attention", _attention, key)
    _started.extend([guard, *libraries])


def keep(library: torch.library.Library) -> None:
    """Hold on to kernels that another file has registered."""
    _started.append(library)


def compiled() -> Path:
    """The shared library of `device_guard.cpp`, compiled at its first use into the folder of DeepSpeed's operators."""
    stamp = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    library = folder / f"stand_in_device_{stamp}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial_file = library.with_suffix(f".{os.getpid()}")
        home = Path(torch.__file__).parent
        command = [
            os.environ.get("CXX", "c++"),
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{home / 'include'}",
            str(SOURCE),
        ]
        subprocess.run([*command, "-o", str(partial_file), f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
        partial_file.replace(library)
    return library


# ------------------------------------------------------------------------------------------------------ same memory


def _relabelled(tensor: Tensor, device_type: int) -> Tensor:
    """The same memory as a tensor of the other device, by way of DLPack."""
    capsule = torch._C._to_dlpack(tensor)
    device = _capsule_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(device).value = device_type
    ctypes.c_int32.from_address(device + 4).value = 0
    return torch._C._from_dlpack(capsule)


def _over(tensor: Tensor, device_type: int) -> Tensor:
    if tensor.layout is torch.strided:
        return _relabelled(tensor.detach(), device_type)
    if tensor.layout is torch.sparse_coo:
        parts = [_relabelled(part, device_type) for part in (tensor._indices(), tensor._values())]
        return torch.sparse_coo_tensor(
            *parts, tensor.shape, is_coalesced=tensor.is_coalesced(), check_invariants=False
        )
    rows = tensor.layout is torch.sparse_csr
    names = ("crow_indices", "col_indices") if rows else ("ccol_indices", "row_indices")
    parts = [_relabelled(getattr(tensor, name)(), device_type) for name in (*names, "values")]
    return torch.sparse_compressed_tensor(*parts, tensor.shape, layout=tensor.layout, check_invariants=False)


def to_host(value: Any) -> Any:
    """`value` with every CUDA tensor as a CPU tensor of the same memory, and the CPU in place of the device."""
    if isinstance(value, Tensor):
        return _over(value, _DLPACK_CPU) if value.is_cuda else value
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, list | tuple):
        return type(value)(map(to_host, value))
    return value


def _to_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _over(value, _DLPACK_CUDA)
    if isinstance(value, list | tuple):
        return type(value)(map(_to_device, value))
    return value


# ---------------------------------------------------------------------------------------------------------- kernels


def overload(name: str) -> torch._ops.OpOverload:
    """The operation of a name as the dispatcher has it, such as `aten::add.Tensor`."""
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, space), packet), overload or "default")


def _kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What stands in for the CUDA kernel of `op`."""
    returns = [r.alias_info for r in op._schema.returns]
    if any(alias is not None and not alias.is_write for alias in returns) or op.name().startswith("aten::set_"):
        return partial(_same_storage, op)  # a view
    if op is torch.ops.aten._local_scalar_dense.default:
        return partial(_same_storage, op)
    written = [None if alias is None else _argument(op, alias.before_set) for alias in returns]
    return partial(_run, op, written)


def _argument(op: torch._ops.OpOverload, alias: set[str]) -> int | str:
    """Position of the argument with that alias, or its name where it is given by name."""
    for at, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == alias:
            return argument.name if argument.kwarg_only else at
    raise AssertionError(op)


def _same_storage(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """The CPU's kernel on the tensor itself: such a kernel asks for no device, and a view has to share the storage."""
    reports.note(op, args, kwargs)
    layout = next((v.layout for v in args if isinstance(v, Tensor)), torch.strided)
    sparse = {torch.strided: "CPU", torch.sparse_coo: "SparseCPU"}.get(layout, "SparseCsrCPU")
    return op.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, sparse)), *args, **kwargs)


def _run(op: torch._ops.OpOverload, written: list[Any], *args: Any, **kwargs: Any) -> Any:
    reports.note(op, args, kwargs)
    if not torch._C._should_allow_numbers_as_tensors(op._schema.name.partition("::")[2]):
        args = tuple(map(_as_given, op._schema.arguments, args))
    named = {name: to_host(value) for name, value in kwargs.items()}
    empty = {at: torch.empty(0, dtype=kwargs[at].dtype, device="cpu") for at in written if _is_empty(at, kwargs)}
    out = op(*map(to_host, args), **named | empty)
    for at, filled in empty.items():  # memory of the stand-in cannot grow
        kwargs[at].set_(_to_device(filled))
    if not any(at is not None for at in written):
        return _to_device(out)
    given = [None if at is None else kwargs[at] if isinstance(at, str) else args[at] for at in written]
    if len(given) == 1:
        return given[0]
    made = [_to_device(o) if g is None else g for o, g in zip(out, given, strict=True)]
    return tuple(made)


def _as_given(argument: Any, value: Any) -> Any:
    """A number in place of a tensor as a tensor again: torch hands on a number, which some overloads refuse."""
    is_number = isinstance(value, int | float) and isinstance(argument.type, torch.TensorType)
    return torch.tensor(value, device="cpu") if is_number else value


def _is_empty(at: Any, kwargs: dict[str, Any]) -> bool:
    return isinstance(at, str) and isinstance(kwargs[at], Tensor) and kwargs[at].numel() == 0


def _resize(self: Tensor, size: list[int], *, memory_format: torch.memory_format | None = None) -> Tensor:
    grown = torch.empty(size, dtype=self.dtype, device=self.device)
    kept = min(grown.numel(), self.numel())
    grown.view(-1)[:kept].copy_(self.reshape(-1)[:kept])
    return self.set_(grown)


def _copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    reports.note_copy(self, source, non_blocking)
    to_host(self).copy_(to_host(source))
    return self


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The implementation that the CPU would take, which autograd knows as it knows those of CUDA."""
    aten = torch.ops.aten
    options = {"scale": scale, "enable_gqa": enable_gqa}
    hosts = map(to_host, (query, key, value, attn_mask))
    choice = aten._fused_sdp_choice(*hosts, dropout_p, is_causal, **options)
    if choice == _FLASH and (attn_mask is None or not attn_mask.requires_grad):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, **options
    )[0]
