"""Check that an adapter file holds the tensors that the model needs. peft only warns of missing ones, whose fresh
random values would stay, and says nothing of foreign ones."""

from __future__ import annotations

from collections.abc import Mapping

from peft import get_peft_model_state_dict
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


def file_names(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default") -> dict[str, str]:
    """Name of each tensor in the file that peft writes -> its name in `model`.

    Args:
        model: with the adapter attached.
        tensors: what is saved, by the names in `model`.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    written = get_peft_model_state_dict(
        model, state_dict=dict(tensors), adapter_name=adapter_name, save_embedding_layers=False
    )
    return {file_name: names[id(tensor)] for file_name, tensor in written.items()}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def misfit(saved: Shapes, wanted: Shapes) -> str | None:
    """Description of the difference between a file's tensors and those of the model; None if they fit."""
    missing = sorted(wanted.keys() - saved.keys())
    foreign = sorted(saved.keys() - wanted.keys())
    changed = sorted(name for name in wanted.keys() & saved.keys() if saved[name] != wanted[name])
    parts = []
    if missing:
        parts.append(
            f"{len(missing)} of the {len(wanted)} tensors that this model trains are missing ({_some(missing)})"
        )
    if foreign:
        parts.append(f"{len(foreign)} of the {len(saved)} in the file belong to nothing here ({_some(foreign)})")
    if changed:
        sizes = f"{_size(saved[changed[0]])} in the file, {_size(wanted[changed[0]])} here"
        parts.append(f"{len(changed)} have another shape ({_some(changed)}: {sizes})")
    return "; ".join(parts) or None


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"first {names[0]}"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
