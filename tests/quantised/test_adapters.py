"""Adapters over a quantised base: what their directory says, loading and merging with each kind of weights, bytes."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft_ds import adapter, merging
from mmpeft_ds.backbones.common import quantised as quantising
from mmpeft_ds.engine import plan
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.errors import BadInput
from tests.helpers import method_table, peft_table, quantised
from tests.helpers.runs import tiny_adapters

pytestmark = quantised.needs_packages


def recipe_of(folder: Path, form: str, kind: str = "instruction"):
    recipe = tiny_adapters.recipe(folder, kind)
    recipe.backbone["quantise"] = form
    return recipe


def exported(folder: Path, form: str, kind: str = "instruction", **method) -> Path:
    recipe = recipe_of(folder, form, kind)
    recipe.method |= method
    resolved = resolve.resolve(recipe)
    torch.manual_seed(7)
    model = resolve.attach(resolved, resolved.backbone.build()).eval()
    with torch.no_grad():
        for parameter in quantised.trained(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return export_adapter(folder / "adapter", model, resolved, {})


def change_base(folder: Path) -> None:
    """Another value in one weight of the checkpoint."""
    path = folder / "mllm" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name][3, 4] += 1.0
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_merging_says_which_weights_the_merged_model_equals(tmp_path, form):
    directory = exported(tmp_path, form)
    assert json.loads((directory / "backbone.json").read_text())["options"]["quantise"] == form
    for weights, other in (("dequantised", "original"), ("original", "dequantised")):
        found = merging.merge(directory, tmp_path / weights, weights)["differences"]
        assert found[weights] < 1e-5 < 1e-3 < found[other]
        assert (found["as trained"] < 1e-4) == (weights == "dequantised")
        assert json.loads((tmp_path / weights / "merged.json").read_text())["weights"] == weights


@pytest.mark.slow
@pytest.mark.parametrize("form", quantised.FORMS)
def test_a_gpt2_whose_layers_are_stored_in_by_out_is_merged(tmp_path, form):
    directory = exported(tmp_path, form, "captioning")
    for weights in ("dequantised", "original"):
        assert merging.merge(directory, tmp_path / weights, weights)["largest_difference"] < 1e-5


def test_the_original_base_is_loaded_with_a_line_and_another_is_refused(tmp_path, caplog):
    directory = exported(tmp_path, "nf4")
    with caplog.at_level(logging.WARNING):
        loaded = adapter.load(directory, weights="original")
    assert "trained over nf4 weights, and loaded over the original ones" in caplog.text
    assert not any(map(quantising.is_quantised, loaded.model.modules()))
    with pytest.raises(BadInput, match="trained over weights in the form nf4: it would be another base"):
        adapter.load(directory, overrides=["backbone.quantise=int8"])
    change_base(tmp_path)
    for weights in ("as trained", "dequantised", "original"):
        with pytest.raises(BadInput, match=r"q_proj.weight.(packed|absmax).* The base model has changed"):
            adapter.load(directory, weights=weights)


@pytest.mark.parametrize("form", quantised.FORMS)
def test_the_planned_bytes_are_those_that_weights_take(tmp_path, form):
    resolved = resolve.resolve(recipe_of(tmp_path, form))
    told = plan.make(resolved)
    model = resolved.backbone.build()
    parts = [part for p in model.parameters() for part in quantising.stored(p).values()]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    with torch.device("meta"):
        sizes = plan.Sizes.of(resolve.attach(resolved, resolved.backbone.build(on_meta=True)), 2)
    planned = sum(round(t.numel * t.width) for t in sizes.tensors if not t.trained)
    assert planned == pytest.approx(sum(storages.values()), rel=0.01)
    assert told["quantised"]["layers"] == sum(map(quantising.is_quantised, model.modules())) > 10
    assert told["total_parameters"] - told["trainable_parameters"] == sum(map(quantising.numel, model.parameters()))


def test_what_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, "nf4")
    recipe.engine.deepspeed = "ds_configs/zero3.json"
    with pytest.raises(BadInput, match="nf4, but ZeRO stage 3 splits plain parameters"):
        resolve.resolve(recipe)
    recipe = recipe_of(tmp_path, "nf4")
    recipe.method |= {"init_lora_weights": "pissa"}
    resolved = resolve.resolve(recipe)
    with pytest.raises(BadInput, match="pissa starts from float weights, and those of \\S+ are quantised"):
        resolve.attach(resolved, resolved.backbone.build())
    recipe.method |= {"init_lora_weights": True, "modules_to_save": ["mlp"]}
    resolved = resolve.resolve(recipe)
    with pytest.raises(BadInput, match="modules_to_save: .*mlp.* is quantised and cannot be trained"):
        resolve.attach(resolved, resolved.backbone.build())
    recipe.method = {"name": "routed_lora", "r": 2, "route": "none"}
    resolved = resolve.resolve(recipe)
    model = resolve.attach(resolved, resolved.backbone.build())
    with pytest.raises(BadInput, match="its frozen weights are quantised"):
        model.merge_and_unload()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"needs the package bitsandbytes. Install it: pip install 'mmpeft_ds\[quan"):
        resolve.resolve(recipe)


def test_types_of_peft_that_work_over_it_train(tmp_path):
    column = method_table.Column.make("vision_text_encoder", tmp_path)
    for form, kind in (("nf4", "boft"), ("int8", "ln_tuning"), ("fp8", "lora")):
        backbone = copy.copy(column.backbone)
        backbone.options = dataclasses.replace(backbone.options, quantise=form)
        model = copy.deepcopy(backbone.build().eval())
        with torch.no_grad():
            said = method_table.say(backbone, model, column.batch)
        assert not torch.equal(said, column.said), "nothing was quantised"
        peft_table.try_on(kind, dataclasses.replace(column, backbone=backbone, model=model, said=said))  # it asserts


@pytest.mark.parametrize(("form", "kind"), [("nf4", "c3a"), ("int8", "boft"), ("fp8", "loha")])
def test_types_of_peft_that_read_float_weights_are_refused_before_a_run(tmp_path, form, kind):
    recipe = recipe_of(tmp_path, form, "vqa")
    recipe.method = {"name": "peft", "type": kind}
    with pytest.raises(BadInput, match=f"type: {kind} is not offered over this quantised base: .*Use lora, or "):
        plan.make(resolve.resolve(recipe))
