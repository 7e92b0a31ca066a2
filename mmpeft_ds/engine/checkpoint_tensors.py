"""Float32 tensors as a safetensors file, written from where they lie, and hashed in the same pass.

`safetensors.torch.save_file` writes the same bytes. It checks and converts every tensor by itself, which takes longer
than the writing where tensors are as small as those of an adapter, and the file must then be read again for its hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch
import xxhash
from torch import Tensor

from mmpeft_ds.files import check_regular, naming

XXH3 = "xxh3_128:"  # before the digits of that hash, which takes a fortieth of the time of sha256
_BLOCK = 1 << 20


def write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file with the permissions that the umask gives.

    Args:
        tensors: name -> contiguous float32 tensor on the CPU.

    Returns:
        the hash of the file's bytes, as `hashed` gives it.

    Raises:
        TypeError: for a tensor of another type, of another device, or with gaps.
    """
    digest = xxhash.xxh3_128()
    with naming(path), open(path, "wb", buffering=0) as file:
        for data in _parts(tensors):
            digest.update(data)
            _write_all(file, data)
    return XXH3 + digest.hexdigest()


def hashed(path: Path) -> str:
    """`xxh3_128:` and 32 hexadecimal digits of the bytes of a file."""
    check_regular(path)
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return XXH3 + digest.hexdigest()


def _parts(tensors: dict[str, Tensor]) -> Iterable[memoryview]:
    """The bytes of the file: its header, and the tensors in the order of their names, as safetensors has them."""
    names, header, end = sorted(tensors, key=str.encode), {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise TypeError(f"{name}: {tensor.dtype} on {tensor.device}, expected contiguous float32 on the CPU")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield memoryview(tensors[name].detach().reshape(-1).view(torch.uint8).numpy())


def _write_all(file: IO[bytes], data: memoryview) -> None:
    while len(data):  # the system writes 2 GiB at a time at most
        data = data[os.write(file.fileno(), data) :]
