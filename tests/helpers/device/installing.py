"""Attention packages put in front of the module search path, as transformers looks for them, and taken off again."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import modeling_flash_attention_utils as roads
from transformers.utils import import_utils

FLASH_2 = Path(__file__).parent / "stand_in"  # the package flash_attn of the distribution flash-attn


def describe(folder: Path, distribution: str, version: str, package: str) -> None:
    """Write what pip leaves beside a package, by which importlib.metadata knows of it."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "top_level.txt").write_text(f"{package}\n")


@contextlib.contextmanager
def installed(*folders: Path) -> Iterator[None]:
    """Within the block the packages in `folders` are installed and transformers sees a GPU, of a CPU machine."""
    before = list(sys.path)  # under test: where transformers looks for packages
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        sys.path[:0] = map(str, folders)  # under test
        _forget()
        import_utils.is_torch_cuda_available()  # it remembers the answer until the end of the block
    try:
        yield
    finally:
        sys.path[:] = before  # under test
        _forget()


def _forget() -> None:
    """Let transformers look again."""
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    for question in (
        import_utils._package_distribution_mapping,
        import_utils.is_torch_cuda_available,
        transformers.utils.is_flash_attn_2_available,
        transformers.utils.is_flash_attn_3_available,
        transformers.utils.is_flash_attn_4_available,
        import_utils.is_flash_attn_greater_or_equal,
    ):
        question.cache_clear()
    roads._loaded_implementation = None
