"""What the tests of quantised bases share: forms, methods, a tiny multimodal model with and without its weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpeft_ds.backbones.common import quantised
from mmpeft_ds.backbones.common.options import QUANTISED
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.resolve import attach
from mmpeft_ds.tasks.instruction.task import Instruction, Options
from tests.helpers.rank_scripts import mllm
from tests.helpers.runs import tiny_classifier

FORMS = tuple(QUANTISED)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 2},
    "lora, DoRA": {"name": "lora", "r": 2, "use_dora": True},
    "routed_lora": {"name": "routed_lora", "r": 2, "route": "mul"},
    "routed_adapter": {"name": "routed_adapter", "r": 2, "route": "mul"},
    "p_adapter": {"name": "p_adapter"},
    "aurora": {"name": "aurora"},
    "deep_prompt": {"name": "deep_prompt"},
    "adapter": {"name": "adapter"},
    "uni_adapter": {"name": "uni_adapter"},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "layer_norm": {"name": "layer_norm"},
    "graph_lora": {"name": "graph_lora"},
    "tens_lora": {"name": "tens_lora", "r": 2},
}
# What a method needs beside that on one family: the towers of the tiny LLaVA have feed-forward layers that Aurora
# refuses, and its language model has no biases.
OF_FAMILY: dict[tuple[str, str], dict[str, Any]] = {
    ("llava", "aurora"): {"image_targets": ["q", "k", "v", "out"]},
    ("llava", "bitfit"): {"tower": "image"},
}
# nf4 and fp8 layers multiply by the dequantised weights themselves; int8 layers scale the product, which rounds
# otherwise, and the p-Laplacian magnifies that. Shares of the largest gradient.
TOLERANCE = {"nf4": 1e-6, "int8": 2e-5, "fp8": 1e-6}
MAGNIFIED = {"p_adapter": 100}

needs_packages = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in set(QUANTISED.values())),
    reason="needs bitsandbytes and torchao: make test-quantised",
)


def method(family: str, name: str) -> dict[str, Any]:
    """A method of `METHODS` as a recipe names it for the tiny model of a family."""
    return METHODS[name] | OF_FAMILY.get((family, name), {})


def gradients(
    folder: Path, family: str, form: str, method: dict[str, Any], dequantised: bool
) -> tuple[float, dict[str, Tensor | None]]:
    """Loss and gradients of a tiny multimodal model after some noise in what trains.

    Args:
        folder: holds the checkpoint below `family`.
        dequantised: plain float32 layers with the dequantised weights take the place of quantised ones.
    """
    case = {"family": family, "method": method, "condition": "pooled", "quantise": form}
    task = Instruction(Options(max_new_tokens=3), None)
    resolved = tiny_classifier.make_resolved(mllm.make_recipe(folder, case), task)
    base = resolved.backbone.build()
    assert any(map(quantised.is_quantised, base.modules()))
    if dequantised:
        base = quantised.dequantise(base)
        assert not any(map(quantised.is_quantised, base.modules()))
    torch.manual_seed(0)
    model = attach(resolved, base).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    batch = tiny_classifier.pack_slots(mllm.slots(0, resolved.backbone), resolved.backbone, task)
    loss = task.loss(forward(model, resolved.backbone, batch), batch) / task.weight(batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trained(model).items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_gradients(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], share: float) -> None:
    """Check two sets of gradients to a share of the largest."""
    assert found.keys() == wanted.keys()
    reached = {name: grad for name, grad in wanted.items() if grad is not None}
    largest = max(float(grad.abs().max()) for grad in reached.values())
    assert largest > 0
    assert {name for name, grad in found.items() if grad is not None} == reached.keys()
    for name, grad in reached.items():
        torch.testing.assert_close(found[name], grad, atol=share * largest, rtol=0, msg=name)
