"""LoRA over a quantised base starts from what quantisation has lost (LoftQ)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn

from mmpeft_ds import adapter, merging
from mmpeft_ds.backbones.common import quantised as quantising
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine.assembly import build as building
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.assembly.build import start_data
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.methods.lora import start
from tests.helpers import quantised
from tests.helpers.runs import tiny_adapters

pytestmark = quantised.needs_packages
RANK = 3
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def attached(folder: Path, form: str, **method: Any):
    recipe = tiny_adapters.recipe(folder, "instruction")
    recipe.backbone["quantise"] = form
    recipe.method |= {"r": RANK, "lora_alpha": 2 * RANK, **method}
    resolved = resolve.resolve(recipe)
    torch.manual_seed(7)
    return resolved, resolve.attach(resolved, resolved.backbone.build()).eval()


def started(folder: Path, form: str):
    resolved, model = attached(folder, form, init_lora_weights="loftq")
    assert resolved.method.reads_batches(resolved.method_config)
    resolved.method.start(model, start_data(resolved, model, itertools.repeat(None)))
    return resolved, model


def said(model: nn.Module, backbone: Any) -> torch.Tensor:
    return merging.outputs(model.eval(), backbone, merging.probe(backbone))[0]


@pytest.mark.parametrize("form", quantised.FORMS)
@torch.no_grad()
def test_it_begins_as_the_best_approximation_of_what_each_weight_has_lost(tmp_path, form):
    _, model = started(tmp_path, form)
    _, plain = attached(tmp_path, "none")
    layers, originals = dict(start.layers(model)), dict(start.layers(plain))
    assert layers.keys() == originals.keys() and len(layers) >= 4
    for path, layer in layers.items():
        weight, now = originals[path].get_base_layer().weight, quantising.weight_of(layer.get_base_layer())
        lost = weight - now.float()
        found = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        theirs = _low_rank_decomposition(lost, RANK)
        torch.testing.assert_close(found, theirs["L"] @ theirs["R"], rtol=0, atol=1e-6)
        assert (lost - found).norm() < lost.norm()


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_what_was_trained_is_what_the_adapter_says_to_us_and_to_peft(tmp_path, form):
    resolved, model = started(tmp_path, form)
    backbone, first = resolved.backbone, said(model, resolved.backbone)
    with torch.no_grad():
        for parameter in quantised.trained(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    trained = said(model, backbone)
    directory = export_adapter(tmp_path / "adapter", model, resolved, {})
    loaded = adapter.load(directory)
    assert torch.equal(said(loaded.model, loaded.backbone), trained) and not torch.equal(trained, first)
    theirs = PeftModel.from_pretrained(backbone.build(), directory)
    torch.testing.assert_close(said(theirs, backbone), trained, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_base_whose_weights_are_drawn_is_drawn_again_for_it_and_the_generator_is_left_alone(tmp_path):
    layers = {}
    for form, begun in (("none", True), ("nf4", "loftq")):
        recipe = tiny_adapters.recipe(tmp_path, "instruction")
        recipe.backbone |= {"quantise": form, "random_weights": True}
        recipe.method |= {"r": RANK, "init_lora_weights": begun}
        resolved = resolve.resolve(recipe)
        base = building.load_base(resolved, ALONE, stage=0)
        layers[form] = dict(start.layers(building.adapted(resolved, base, lambda: iter(()))))
        layers[form, "next"] = torch.rand(3)
    assert torch.equal(layers["none", "next"], layers["nf4", "next"])
    for path, layer in layers["nf4"].items():
        lost = layers["none"][path].get_base_layer().weight - quantising.weight_of(layer.get_base_layer()).float()
        found = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert (lost - found).norm() < 0.9 * lost.norm()
