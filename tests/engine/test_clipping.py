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


@pytest.mark.parametrize("most", [0.1, 0.37, 1.0, 5.0])
@pytest.mark.parametrize("norm", [0.0, 0.0999999, 0.1, 0.7123456789, 1.0000001, 17.123456789, 3.4e5])
def test_clipping_without_zero_has_the_bits_of_deepspeed_and_asks_no_other_rank(most, norm):
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    asked, unused = [], torch.nn.Parameter(torch.ones(2))
    engine = types.SimpleNamespace(
        optimizer=types.SimpleNamespace(param_groups=[{"params": [weight, unused]}]),
        zero_optimization_stage=lambda: 0,
        gradient_clipping=lambda: most,
        clip_fp32_gradients=lambda: asked.append(1),  # DeepSpeed's, which sums a norm over ranks
    )
    # as deepspeed.runtime.utils.clip_grad_norm_ multiplies
    share = torch.min(torch.tensor([1.0]), torch.tensor([most]) / (torch.tensor([norm]) + 1e-6))
    expected = weight.grad * share
    with gradients.know_norm(engine)(norm):
        engine.clip_fp32_gradients()
    assert torch.equal(weight.grad, expected) and not asked
    engine.clip_fp32_gradients()
    assert asked, "nobody has said the norm"
