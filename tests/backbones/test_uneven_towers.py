"""Towers a part of which runs once an image, at ZeRO-3, where all ranks gather weights together."""

import pytest

from mmpeft_ds.backbones.common.model_hooks import model_hooks
from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.errors import BadInput
from tests.helpers.models import tiny_families


@pytest.fixture
def model(tmp_path):
    return ENTRY(Options(tiny_families.write(tmp_path, "hunyuan_vl")), None).build(on_meta=True)


def test_a_frozen_one_is_gathered_as_a_whole(model):
    tower = model.get_encoder(modality="image")
    assert any(model.get_submodule(path) is tower for path in model_hooks(model).runs_unevenly)


def test_a_trained_one_is_refused_in_one_line(model):
    next(model.get_encoder(modality="image").parameters()).requires_grad_(True)
    with pytest.raises(
        BadInput, match=r"once an image \('hunyuan_vl'\).* Keep the method out of the tower"
    ) as refused:
        _ = model_hooks(model).runs_unevenly
    assert "\n" not in str(refused.value)
