"""Adapters of every family: loaded again by peft, merged, and trained through layers that are computed again."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch

from mmpeft_ds import methods
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.saved_adapter import attach_saved
from mmpeft_ds.engine.step import set_modes
from mmpeft_ds.recipe.components import Section
from mmpeft_ds.recipe.parse import Origin
from mmpeft_ds.sites.condition import enable_checkpointing
from tests.helpers.models import tiny_families, tiny_mllm
from tests.helpers.models.family_samples import ALL, attached, batch, samples_of
from tests.helpers.models.family_stock import made

# Whose adapters peft 0.21 renames as it renames a checkpoint of the base, and finds no place for.
RENAMED = ("deepseek_ocr2", "unlimited_ocr")
QUICK = ("llava", "internvl", "qwen3_5")
EVERY = [*tiny_mllm.FAMILIES, *tiny_families.FAMILIES]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    written = tiny_mllm if request.param in tiny_mllm.FAMILIES else tiny_families
    return written.write(tmp_path_factory.mktemp(request.param), request.param)


every_family = pytest.mark.parametrize(
    "folder", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in EVERY], indirect=True
)


def logits(backbone, model, packed):
    return backbone.read(model(**backbone.inputs(packed)), packed).logits


@every_family
@torch.no_grad()
def test_an_adapter_is_the_same_when_it_is_loaded_again_and_when_it_is_merged(folder, tmp_path):
    backbone, base = made(folder)
    packed = batch(backbone, *samples_of(backbone, *ALL))
    frozen = logits(backbone, base, packed)
    model = attached("lora", backbone, base).eval()
    adapted = logits(backbone, model, packed)
    assert (adapted - frozen).abs().max() > 1e-4 * frozen.abs().max()
    model.save_pretrained(tmp_path)
    if backbone._config.model_type in RENAMED:
        with pytest.warns(UserWarning, match="missing adapter keys"):
            peft.PeftModel.from_pretrained(made(folder)[1], tmp_path)
        own = {"name": "lora", "r": 2, "target_modules": sorted(model.peft_config["default"].target_modules)}
        own |= {"init_lora_weights": False}
        section = Section.read(methods, own, "method", Origin("tests", {}))
        loaded = attach_saved(tmp_path, made(folder)[1], section).eval()
    else:
        loaded = peft.PeftModel.from_pretrained(made(folder)[1], tmp_path).eval()
    assert torch.equal(logits(backbone, loaded, packed), adapted)
    merged = model.merge_and_unload()
    assert (logits(backbone, merged, packed) - adapted).abs().max() <= 1e-5 * adapted.abs().max()


@every_family
def test_layers_that_are_computed_again_give_the_same_gradients(folder):
    backbone, base = made(folder)
    packed = batch(backbone, *samples_of(backbone, *ALL))
    model, gradients = attached("lora", backbone, base), []
    for again in (False, True):
        if again:
            enable_checkpointing(model.get_base_model())
        recipe = SimpleNamespace(engine=SimpleNamespace(train_dropout=False, gradient_checkpointing=again))
        set_modes(model, backbone, recipe)
        model.zero_grad()
        forward(model, backbone, packed).token_losses()[0].sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()) + 1e-9)
