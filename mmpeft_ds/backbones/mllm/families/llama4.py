"""Llama 4: its projector comes after the features, in the forward of the whole model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmpeft_ds.backbones.mllm.families.base import Family


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
    """Features before the projector."""

    model_types = ("llama4",)
    unpackable = ""
    by_mask = True

    def width(self, config: PretrainedConfig) -> int:
        return config.vision_config.vision_output_dim

    def apart(self, output: Any) -> Any:
        output.pooler_output = output.last_hidden_state
        return output

    def joined(self, output: Any) -> Any:
        return _Unprojected(pooler_output=output.pooler_output)


ENTRY = Llama4()
