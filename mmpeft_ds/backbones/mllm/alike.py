"""What ranks must do alike at ZeRO-3, whatever images each of them has: a weight is gathered by all ranks together, as
often on one as on another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmpeft_ds.errors import BadInput


def is_split(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split the weights across ranks."""
    return hasattr(next(model.parameters()), "ds_id")


def uneven(model: PreTrainedModel, inner: nn.Module, merges_each: bool) -> tuple[str, ...]:
    """Paths of the blocks of the vision tower and of what stands after it: in some families a part of them runs once
    an image.

    Args:
        inner: the towers and the language model, below the output layer.
        merges_each: a part of the tower outside of its blocks does so too; its path then stands for all in it.

    Raises:
        BadInput: such a tower is trained, so that it cannot be gathered as a whole.
    """
    text, tower = model.get_decoder(), model.get_encoder(modality="image")
    if merges_each and any(p.requires_grad for p in tower.parameters()):
        raise BadInput(
            "engine.deepspeed: ZeRO stage 3, but the method trains a vision tower a part of which runs once an image "
            f"({model.config.model_type!r}), and ranks differ in their images. Keep the method out of the tower "
            "(target_modules, tower), or use ds_configs/zero2.json."
        )
    paths, prefix = [], "" if inner is model else "model."
    for name, child in inner.named_children():
        if child is tower and not merges_each:
            paths += [f"{prefix}{name}.{path}" for path in _elements(child)]
        elif isinstance(child, nn.ModuleList):  # whose own forward never runs
            paths += [f"{prefix}{name}.{i}" for i in range(len(child))]
        elif all(module is not text for module in child.modules()):
            paths.append(f"{prefix}{name}")
    return tuple(paths)


def _elements(module: nn.Module) -> list[str]:
    """Paths of the elements of all lists in a module that stand in no other list."""
    lists = [path for path, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return [f"{path}.{i}" for path in outer for i in range(len(module.get_submodule(path)))]


def with_parts(given: dict[str, Any], side: int) -> dict[str, Any]:
    """Arguments of `get_image_features` for images without parts, and for one more, whose one part is black: the tower
    runs once more for parts, as on ranks that have some.

    Args:
        given: for I images, without `pixel_values_local`.
        side: of a part, in pixels.
    """
    pixels = given["pixel_values"]
    more = {"pixel_values": torch.cat([pixels, pixels[:1]])}
    more["pixel_values_local"] = pixels.new_zeros(1, pixels.shape[1], side, side)
    for name, of_one in (("num_local_patches", 1), ("patches_grid", [1, 1])):
        if name in given:
            known = given[name]
            more[name] = torch.cat([known, known.new_ones(1)]) if torch.is_tensor(known) else [*known, of_one]
    return given | more


def without_last(output: Any) -> Any:
    """What came of `with_parts`, without the added image, which enters the backward pass with factor 0."""
    *features, last = output.pooler_output
    output.pooler_output = [feature + last.sum() * 0 for feature in features]
    return output


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Keep the parameters directly on `module` gathered while a method other than its forward reads them.

    ZeRO-3 gathers such parameters for the module's forward only.
    """
    # not those that are not partitioned, resident, or still there from the last step
    away = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id") and p.numel() != p.ds_numel]
    for parameter in away:
        parameter.all_gather()  # what DeepSpeed gives every parameter that it has partitioned
    try:
        yield
    finally:
        for parameter in away:
            parameter.partition(has_been_updated=False)
