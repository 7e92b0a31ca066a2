"""Llama 4: its projector comes after the features, in the forward of the whole model, and its layers without rotary
positions scale queries by places in the row."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.ops.finished_logits import PLAIN
from mmpeft_ds.sites.condition import current


class _Unprojected(BaseModelOutputWithPooling):
    """Features that are read as hidden states, while beams repeat `pooler_output` alone."""

    @property
    def last_hidden_state(self) -> Tensor:
        """The features."""
        return self.pooler_output

    @last_hidden_state.setter
    def last_hidden_state(self, value: Any) -> None:
        pass


class Llama4(Family):
    """Features before the projector; attention in chunks of each text."""

    model_types = ("llama4",)
    unpackable = ""
    row_attention = text_attention.MASKED  # chunks
    finishes = {"llama4": lambda text: PLAIN}  # they are those of the model inside

    def width(self, config: PretrainedConfig) -> int:
        return config.vision_config.vision_output_dim

    def adjust(self, model: PreTrainedModel) -> None:
        for module in model.modules():
            if type(module).__name__ == "Llama4TextAttention" and module.attn_temperature_tuning:
                module.forward = types.MethodType(_by_place_in_text, module)

    def apart(self, output: Any) -> Any:
        output.pooler_output = output.last_hidden_state
        return output

    def joined(self, output: Any) -> Any:
        return _Unprojected(pooler_output=output.pooler_output)


class _Shifted:
    """A cache without keys, of as many tokens before each place of the row as lead to its place in its text."""

    def __init__(self, shifts: Tensor):
        self._shifts = shifts

    def get_seq_length(self, layer_idx: int) -> Tensor:
        """(N,), added to places in the row."""
        return self._shifts

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """As they are."""
        return key, value


def _by_place_in_text(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward, whose scale of queries depends on the place in the text where texts stand in one row."""
    condition = current()
    if condition is not None and (segments := condition.segments) is not None:
        places = segments.place
        kwargs["past_key_values"] = _Shifted(places - torch.arange(len(places), device=places.device))
    return type(self).forward(self, *args, **kwargs)


ENTRY = Llama4()
