"""Reading weights into a model that ZeRO-3 partitioned as it was made, of whose parts transformers expects whole
shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration
from transformers.integrations import is_deepspeed_zero3_enabled


@contextlib.contextmanager
def by_whole_shapes() -> Iterator[None]:
    """Context in which `from_pretrained` converts weights at ZeRO-3 as it does elsewhere, one group after the other,
    and starts no module anew whose weights were read. Nothing below ZeRO-3.

    transformers 5.23 turns, splits and starts weights by the shapes of the model's parameters, and a partitioned one
    has the shape (0,) on every rank: findings/transformers_qwen3_vl_moe_zero3_load.sh.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    convert, start = integration._apply_weight_conversions_to_state_dict, PreTrainedModel.initialize_weights

    def converted(model: PreTrainedModel, *rest: Any) -> Iterator[dict[str, Tensor]]:
        return convert(_WholeShapes(model), *rest)

    def started(model: PreTrainedModel) -> None:
        _mark_what_was_read(model)
        start(model)

    integration._apply_weight_conversions_to_state_dict, PreTrainedModel.initialize_weights = converted, started
    try:
        yield
    finally:
        integration._apply_weight_conversions_to_state_dict, PreTrainedModel.initialize_weights = convert, start


class _WholeShapes:
    """A model as conversions of its weights see it: `get_parameter` gives whole shapes, without values."""

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        parameter = self._model.get_parameter(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return torch.empty(shape, dtype=parameter.dtype, device="meta")


def _mark_what_was_read(model: nn.Module) -> None:
    """Tell transformers of every module with weights of its own that has nothing left to start."""

    def read(tensors: Iterator[Tensor]) -> bool:
        return all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)

    for module in model.modules():
        owns = next(module.parameters(recurse=False), None) is not None
        if owns and read(module.parameters()) and read(module.buffers(recurse=False)):
            module._is_hf_initialized = True
