"""Lists of parameters that DeepSpeed asks for at every fetch of a module under ZeRO-3, made once."""

import types

import pytest
import torch
from torch import nn

from mmpeft_ds.engine.zero import stage3

coordinator = pytest.importorskip("deepspeed.runtime.zero.partitioned_param_coordinator")
offload = pytest.importorskip("deepspeed.runtime.zero.parameter_offload")


@pytest.fixture
def model(monkeypatch):
    """A model as DeepSpeed leaves it: every module knows parameters that it reads and others hold."""
    for module in (coordinator, offload):
        monkeypatch.setattr(module, "iter_params", module.iter_params)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    model[1][0].weight = model[0].weight  # held twice, listed once
    for module in model.modules():
        module.outside = {}
        module.ds_external_parameters = types.MethodType(lambda self: self.outside.items(), module)
    return model


@pytest.mark.parametrize("user", [coordinator, offload])
def test_the_lists_are_those_of_deepspeed_and_made_once(model, user, monkeypatch):
    plain = user.iter_params
    want = {(m, deep): list(map(id, plain(m, deep))) for m in model.modules() for deep in (False, True)}
    stage3.list_parameters_once(model)
    assert user.iter_params is not plain
    for _ in range(2):
        assert {key: list(map(id, user.iter_params(*key))) for key in want} == want
        monkeypatch.setattr(nn.Module, "named_parameters", None)  # no second walk


def test_parameters_that_a_forward_pass_reads_elsewhere_come_later(model):
    stage3.list_parameters_once(model)
    linear, other = model[0], nn.Parameter(torch.zeros(1))
    assert len(list(coordinator.iter_params(linear))) == 2
    linear.outside["other"] = other
    assert list(coordinator.iter_params(linear))[2] is other


def test_other_models_of_the_process_are_walked(model):
    stage3.list_parameters_once(nn.Linear(1, 1))
    model.append(layer := nn.Linear(3, 1))
    layer.outside, layer.ds_external_parameters = {}, lambda: ()
    before = len(list(coordinator.iter_params(model, True)))
    layer.extra = nn.Parameter(torch.zeros(1))
    assert len(list(coordinator.iter_params(model, True))) == before + 1
