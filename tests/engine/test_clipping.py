"""Clipping by a norm that is a number gives the bits of DeepSpeed's own, which is done on tensors."""

from __future__ import annotations

import types

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from mmpeft_ds.engine.zero import gradients


def optimizer(most: float) -> types.SimpleNamespace:
    made = types.SimpleNamespace(clip_grad=most, loss_scale=1.0, device="cpu", scaled_global_norm=None)
    made.unscale_and_clip_grads = types.MethodType(DeepSpeedZeroOptimizer.unscale_and_clip_grads, made)
    return made


@pytest.mark.parametrize("most", [0.0, 0.1, 0.37, 1.0, 5.0])
@pytest.mark.parametrize("norm", [0.0, 1e-7, 0.0999999, 0.1, 0.7123456789, 1.0, 1.0000001, 17.123456789, 3.4e5])
def test_clipping_by_a_number_has_the_bits_of_deepspeed(most, norm):
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    own, other = [gradient.clone()], [gradient.clone()]
    optimizer(most).unscale_and_clip_grads(own, torch.tensor(norm))
    known = optimizer(most)
    gradients._clip_by_number(known)
    known.unscale_and_clip_grads(other, gradients._single(norm))
    assert torch.equal(own[0], other[0])
    assert not torch.equal(own[0], gradient) or most == 0 or norm <= most


def test_a_norm_that_is_a_tensor_goes_to_deepspeed():
    gradient = [torch.ones(3)]
    known = optimizer(1.0)
    gradients._clip_by_number(known)
    known.unscale_and_clip_grads(gradient, torch.tensor(2.0))
    torch.testing.assert_close(gradient[0], torch.full((3,), 0.5))
