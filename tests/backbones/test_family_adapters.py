"""Adapters of every family: loaded again by peft, merged, and trained through layers that are computed again."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch

from mmpeft_ds import methods
from mmpeft_ds.adapter_files import WEIGHTS
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.saved_adapter import attach_saved, name_for_peft
from mmpeft_ds.engine.step import set_modes
from mmpeft_ds.recipe.components import Section
from mmpeft_ds.recipe.parse import Origin
from mmpeft_ds.sites.condition import enable_checkpointing
from tests.helpers import peft_alone
from tests.helpers.models import family_traits
from tests.helpers.models.family_samples import ALL, attached, batch, samples_of
from tests.helpers.models.family_stock import made, stock
from tests.helpers.models.family_traits import EVERY

QUICK = ("llava", "internvl", "qwen3_5")


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return family_traits.write(tmp_path_factory.mktemp(request.param), request.param)


every_family = pytest.mark.parametrize(
    "folder", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in EVERY], indirect=True
)


def logits(backbone, model, packed):
    return backbone.read(model(**backbone.inputs(packed)), packed).logits


def save(model, folder):
    """As a run exports it."""
    model.save_pretrained(folder)
    name_for_peft(model, folder / WEIGHTS)


# Whose tensors peft 0.21 renames as those of a checkpoint of the base, also under their present names.
@pytest.mark.parametrize("folder", ["deepseek_ocr2", "unlimited_ocr"], indirect=True)
@torch.no_grad()
def test_an_adapter_under_names_that_peft_changes_is_read_here_however_it_was_saved(folder, tmp_path, caplog):
    backbone, base = made(folder)
    packed = batch(backbone, *samples_of(backbone, *ALL))
    model = attached("lora", backbone, base).eval()
    adapted = logits(backbone, model, packed)
    model.save_pretrained(tmp_path / "peft")
    save(model, tmp_path / "own")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(made(folder)[1], tmp_path / "peft")
    own = {"name": "lora", "r": 2, "target_modules": sorted(model.peft_config["default"].target_modules)}
    section = Section.read(methods, own | {"init_lora_weights": False}, "method", Origin("tests", {}))
    for saved in ("peft", "own"):
        loaded = attach_saved(tmp_path / saved, made(folder)[1], section).eval()
        assert torch.equal(logits(backbone, loaded, packed), adapted) and not caplog.records


@every_family
@torch.no_grad()
def test_an_adapter_is_the_same_when_it_is_loaded_again_and_when_it_is_merged(folder, tmp_path):
    backbone, base = made(folder)
    packed = batch(backbone, *samples_of(backbone, *ALL))
    frozen = logits(backbone, base, packed)
    model = attached("lora", backbone, base).eval()
    adapted = logits(backbone, model, packed)
    assert (adapted - frozen).abs().max() > 1e-4 * frozen.abs().max()
    save(model, tmp_path)
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


@pytest.mark.slow
def test_peft_opens_the_adapter_of_every_family_on_its_stock_class_in_a_process_without_this_package(tmp_path):
    """Texts without images: an adapter of the language model is read whole or not at all."""
    here, frozen = {}, {}
    for family in EVERY:
        folder = family_traits.write(tmp_path / f"written-{family}", family)
        backbone, base = made(folder)
        inputs = dict(backbone._tokenizer("what color ? red a yes no blue", return_tensors="pt"))
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        plain = type(stock(folder, backbone)).from_pretrained(folder).eval()  # with the attention that it gets there
        peft_alone.write_base(tmp_path, family, plain, inputs)
        save(attached("lora", backbone, base), tmp_path / f"lora-{family}-own")
        with torch.no_grad():
            frozen[family] = plain(**inputs).logits
            adapted = peft.PeftModel.from_pretrained(plain, tmp_path / f"lora-{family}-own").eval()
            here[family] = adapted(**inputs).logits
    there = peft_alone.ask(tmp_path)
    wrong = {}
    for family, logits in here.items():
        scale = logits.abs().max()
        assert (logits - frozen[family]).abs().max() > 1e-4 * scale, family
        difference = float((there[f"{family}-own"] - logits).abs().max() / scale)
        if difference > 1e-6:
            wrong[family] = difference
    assert not wrong
