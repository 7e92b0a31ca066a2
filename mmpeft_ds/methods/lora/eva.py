"""LoRA that starts from activations: EVA (arXiv 2410.07170), as peft computes it over the training stream.

`down` starts as the directions in which the inputs of a layer vary most, from an incremental singular value
decomposition; `up` starts at zero, so the model starts as the frozen one. Layers whose inputs vary more get higher
ranks, with the same sum over all layers. Positions of padding count like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import StartData

MOST_BATCHES = 200  # which peft keeps until the end


def begin(model: PeftModel, data: StartData) -> None:
    """Start every LoRA layer of `model`; see `SiteMethod.start`.

    Raises:
        BadInput: the directions have not settled after MOST_BATCHES batches.
    """
    initialize_lora_eva_weights(
        model,
        _Endless(data.batches),
        forward_fn=data.run,
        prepare_model_inputs_fn=lambda batch, config: None,
        prepare_layer_inputs_fn=None,
        gather_distributed_inputs=False,  # every rank sees the same
        show_progress_bar=False,
    )
    _in_float32(model)


def take_ranks(model: PeftModel, shapes: Mapping[str, Sequence[int]]) -> None:
    """Set the rank of every LoRA layer of `model` to that of a checkpoint, or remove the layer; see
    `SiteMethod.restart`."""
    name = model.active_adapter
    ranks = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            shape = shapes.get(f"{path}.lora_A.{name}.weight")
            if shape is not None or not any(saved.startswith(f"{path}.lora_") for saved in shapes):
                ranks[path] = torch.zeros(shape or (0, layer.in_features))
    initialize_lora_eva_weights(model, eva_state_dict=ranks)
    _in_float32(model)


def _in_float32(model: PeftModel) -> None:
    """Convert the trained parameters to float32: peft creates layers of another rank in the dtype of the frozen
    ones."""
    model.base_model._cast_adapter_dtype(model.active_adapter, autocast_adapter_dtype=True)


class _Endless:
    """Batches for peft, which starts again where they end and stops when the directions have settled."""

    def __init__(self, batches: Iterator[Any]):
        self.batches, self.seen = batches, 0

    def __len__(self) -> int:
        return MOST_BATCHES  # peft asks whether there are any

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.seen += 1
            if self.seen > MOST_BATCHES:
                raise BadInput(
                    f"init_lora_weights: eva has not settled after {MOST_BATCHES:,} batches. Lower r, or tau of "
                    "eva_config (0.99), or raise data.global_batch."
                )
            yield batch
