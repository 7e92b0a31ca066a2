"""Importing a backbone's package is enough for transformers' Auto classes to know its model, before or after it."""

import subprocess
import sys

import pytest

from mmpeft_ds import backbones, registry

CODE = """
import importlib, sys
def load():
    for name in {names}:
        importlib.import_module(f"mmpeft_ds.backbones.{{name}}")
        importlib.import_module(f"mmpeft_ds.backbones.{{name}}.options")
if "{first}" == "ours":
    load()
    assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
from transformers import AutoConfig, AutoModel
if "{first}" == "theirs":
    load()
for kind in {kinds}:
    assert type(AutoConfig.for_model(kind)) in AutoModel._model_mapping, kind
    assert AutoConfig.for_model(kind).model_type == kind
"""
MODELS = {
    "clip_bart": "mmpeft_clip_bart",
    "dual_encoder": "mmpeft_dual_encoder",
    "features": "mmpeft_features",
    "vision_text_decoder": "mmpeft_vision_text_decoder",
    "vision_text_encoder": "mmpeft_vision_text_encoder",
}


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_the_package_of_a_composed_model_registers_it_and_its_options_import_no_torch(first):
    assert set(MODELS) <= set(registry.names(backbones))
    code = CODE.format(names=sorted(MODELS), kinds=sorted(MODELS.values()), first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
