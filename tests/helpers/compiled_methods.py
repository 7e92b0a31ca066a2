"""Methods whose adapters are compiled, attached to a tiny BLIP."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import torch
from torch import Tensor

from tests.helpers import method_table

TOWER = {"tower": ["text_decoder.bert"]}
# method -> options
METHODS: dict[str, dict[str, Any]] = {
    "adapter": TOWER,
    "aurora": {},
    "bitfit": TOWER,
    "deep_prompt": {**TOWER, "reparameterize": 6},
    "graph_lora": TOWER,
    "layer_norm": TOWER,
    "p_adapter": TOWER,
    "routed_adapter": TOWER,
    "routed_lora": TOWER,
    "tens_lora": TOWER,
    "uni_adapter": TOWER,
}


def in_double(column: method_table.Column) -> method_table.Column:
    """The column with model and images in float64; `said` stays as it was."""
    images = {n: t.double() if t.is_floating_point() else t for n, t in column.batch.images.items()}
    batch = dataclasses.replace(column.batch, images=images)
    return dataclasses.replace(column, model=column.model.double(), batch=batch)


def attached(name: str, column: method_table.Column, **options: Any) -> peft.PeftModel:
    """The column's model with a method whose parameters are moved away from where they start."""
    model = method_table._attach(name, column, METHODS.get(name, {}) | options)
    with torch.no_grad():  # `up` starts at zero
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter += 0.05 * noise
    return model.eval()


def outcome(model: peft.PeftModel, column: method_table.Column) -> tuple[Tensor, dict[str, Tensor]]:
    """What the model says of the column's batch, and the gradients of its mean square by name."""
    said = method_table.say(column.backbone, model, column.batch)
    said.square().mean().backward()
    return said.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
