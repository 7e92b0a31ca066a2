"""Weights are converted for parameters that have been partitioned, of which transformers sees the shape (0,), as for
whole ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import deepspeed as integration

from mmpeft_ds.backbones.common import partitioned_loading
from tests.helpers.models import tiny_families


@pytest.fixture
def emptied(tmp_path, monkeypatch):
    """Makes a model whose parameters are partitioned, as far as one process can tell, its values, and its file."""
    monkeypatch.setattr(partitioned_loading, "is_deepspeed_zero3_enabled", lambda: True)

    def make(family: str):
        model = AutoModelForImageTextToText.from_pretrained(tiny_families.write(tmp_path, family))
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for parameter in model.parameters():
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
        return model, values, load_file(tmp_path / "model.safetensors")

    return make


def converted(model, weights: dict) -> dict:
    groups = integration._apply_weight_conversions_to_state_dict(
        model, dict(weights), get_model_conversion_mapping(model)
    )
    return {name: value for group in groups for name, value in group.items()}


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "molmo2"])
def test_conversions_see_whole_shapes_of_partitioned_parameters(emptied, family):
    model, values, weights = emptied(family)
    with partitioned_loading.by_whole_shapes():
        found = converted(model, weights)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())
    # Without it one turns all experts, and the other splits off nothing.
    with pytest.raises((AssertionError, RuntimeError)):
        assert all(value.shape == values[name].shape for name, value in converted(model, weights).items())


def test_modules_whose_weights_were_read_are_not_started_again(emptied):
    model, *_ = emptied("granite4_vision")
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    with pytest.raises(ZeroDivisionError):
        model.initialize_weights()
    for module in model.modules():
        module._is_hf_initialized = False
    with partitioned_loading.by_whole_shapes():
        model.initialize_weights()
