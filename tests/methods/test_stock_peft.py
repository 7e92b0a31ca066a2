"""Adapters that stock peft can read, opened in a process that never imports this package: the same logits as here."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from mmpeft_ds import adapter
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import streams
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.assembly.build import start_data
from mmpeft_ds.engine.export import export_adapter
from tests.helpers import peft_alone, peft_table
from tests.helpers.models.tiny_stock import fill
from tests.helpers.runs import tiny_adapters

pytestmark = pytest.mark.slow  # tests/test_lora_export.py has a quick one of this kind
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
STARTS = ("pissa", "pissa_niter_2", "olora", "eva", "corda", "lora_ga", "orthogonal")
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "parameters": {"target_parameters": ["q_proj.weight", "v_proj.weight"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "whole": {"modules_to_save": ["norm"]},
    **{start: {"init_lora_weights": start} for start in STARTS},
}


def exported(folder: Path, name: str, options: dict[str, Any]) -> Path:
    """The directory of an adapter with values of its own, by the way that a run takes."""
    recipe = tiny_adapters.recipe(folder, "instruction")
    recipe.method |= options
    resolved = resolve.resolve(recipe)
    torch.manual_seed(7)
    model = resolve.attach(resolved, resolved.backbone.build())
    if resolved.method.reads_batches(resolved.method_config):
        resolved.method.start(model, start_data(resolved, model, streams.first_batches(resolved, ALONE)))
    fill(model, scale=0.2)
    return export_adapter(folder / f"lora-qwen-{name}", model.eval(), resolved, {})


@torch.no_grad()
def logits_here(directory: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Of the adapter as this package loads it, by the forward of the stock class."""
    base = adapter.load(directory).model.get_base_model()
    return Qwen2VLForConditionalGeneration.forward(base, **inputs).logits


def test_adapter_directories_of_every_variant_of_lora_give_their_logits(tmp_path):
    inputs = {"input_ids": torch.tensor([[5, 3, 6, 7, 5, 4], [9, 4, 5, 3, 2, 8]])}
    want = {f"qwen-{name}": logits_here(exported(tmp_path, name, options), inputs) for name, options in LORA.items()}
    stock = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "mllm").eval()
    peft_alone.write_base(tmp_path, "qwen", stock, inputs)
    changed = shutil.copytree(tmp_path / "lora-qwen-plain", tmp_path / "lora-qwen-changed")
    tensors = load_file(changed / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 0.5
    save_file(tensors, changed / "adapter_model.safetensors", {"format": "pt"})
    found, frozen = peft_alone.ask(tmp_path), peft_alone.said(stock, inputs)
    for name, expected in want.items():
        peft_table.assert_equal(found[name], expected, frozen, name)
    with pytest.raises(AssertionError):  # negative control: one weight is another
        peft_table.assert_equal(found["qwen-changed"], want["qwen-plain"], frozen, "changed")


def test_directories_of_the_types_of_peft_give_their_logits(tmp_path):
    there = [name for name in peft_table.OFFERED if name != "adamss" or importlib.util.find_spec("sklearn")]
    found = peft_table.alone(there, tmp_path)
    assert list(found) == there
    for name, logits in found.items():
        peft_table.assert_equal(*logits, name)
