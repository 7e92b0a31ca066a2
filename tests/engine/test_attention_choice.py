"""Which attention implementation a base loads with: what is installed, and what backbone and method can use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from mmpeft_ds import methods, registry
from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.options import ATTENTION, EngineOptions
from tests.helpers import plain_methods
from tests.helpers.device import installing
from tests.helpers.models import tiny_backbones

OWN = {"clip_bart": "sdpa", "blip": "eager"}  # where flash-attn computes something else, or there is nothing else
HIDDEN = [name for name in ATTENTION if name not in ("auto", "eager", "sdpa")]


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, recipes.Section]:
    folder: Path = tmp_path_factory.mktemp("backbones")
    found = {}
    for name, make in tiny_backbones.MAKERS.items():
        given = {"name": name, **dataclasses.asdict(make(folder / name).options)}
        found[name] = recipes.components(recipes.Recipe(run_dir="r", backbone=given, method={"name": "lora"})).backbone
    return found


@pytest.fixture
def installed(monkeypatch):
    """As if every implementation were installed, on a machine with a GPU."""
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available", "is_flash_attn_4_available"):
        monkeypatch.setattr(transformers.utils, name, lambda: True)
    monkeypatch.setattr(tower_loading, "is_flash_attn_2_available", lambda: True)


def choice(section: recipes.Section, wanted: str = "auto", observed: bool = False) -> str:
    engine = EngineOptions(attention=wanted, dtype="bfloat16")
    backbone = resolve.make_backbone(section, engine, tiny_backbones.LABELS, observed=observed)
    return tower_loading.choose_attention(backbone.attention, backbone.dtype)


@pytest.mark.parametrize("name", tiny_backbones.MAKERS)
def test_auto_takes_flash_where_backbone_and_method_work_with_it(sections, installed, name):
    assert choice(sections[name]) == OWN.get(name, "flash_attention_2")
    assert choice(sections[name], observed=True) == OWN.get(name, "sdpa"), "flash-attn shows no scores"


@pytest.mark.parametrize("name", tiny_backbones.MAKERS)
def test_without_flash_auto_is_sdpa(sections, name):
    assert choice(sections[name]) == OWN.get(name, "sdpa")


@pytest.mark.parametrize("wanted", HIDDEN)
@pytest.mark.parametrize("name", ["mllm", "vision_text_encoder"])
def test_what_hides_the_scores_is_refused_for_a_method_that_reads_them(sections, installed, name, wanted):
    assert choice(sections[name], wanted) == wanted
    with pytest.raises(BadInput, match=f"{wanted}.*does not show its scores.*sdpa"):
        choice(sections[name], wanted, observed=True)


@pytest.mark.parametrize("wanted", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn3"])
def test_what_a_backbone_cannot_use_is_refused(sections, installed, wanted):
    with pytest.raises(BadInput, match=f"{wanted}.*does not work with clip_bart, which takes sdpa, eager"):
        choice(sections["clip_bart"], wanted)
    with pytest.raises(BadInput, match="'sdpa' does not work with blip, which takes eager"):
        choice(sections["blip"], "sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash-attn may be installed beside a GPU")
def test_what_is_not_installed_is_refused_before_anything_is_loaded(sections):
    with pytest.raises(BadInput, match="flash_attention_3.*not installed"):
        choice(sections["mllm"], "flash_attention_3")


@pytest.mark.parametrize("versions", [[], ["0.17.2"]])
def test_a_kernel_of_the_hub_needs_the_package_that_loads_it(sections, tmp_path, versions):
    for version in versions:
        installing.describe(tmp_path, "kernels", version, "kernels")
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("")
    with installing.installed(tmp_path):
        with pytest.raises(BadInput, match="flash-attn2.*package kernels, of which transformers.*asks for >="):
            choice(sections["mllm"], "kernels-community/flash-attn2")


def test_a_kernel_of_the_hub_is_taken_where_its_package_fits(sections, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: True)
    assert choice(sections["mllm"], "kernels-community/flash-attn2") == "kernels-community/flash-attn2"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(BadInput, match="'flash' is unknown. Known: auto, eager, sdpa"):
        EngineOptions(attention="flash")
    assert EngineOptions(attention="kernels-community/vllm-flash-attn3:fa3")


def test_the_methods_that_read_scores_say_so():
    """Asked of the code: whoever opens an observation in its forward needs SDPA or eager."""
    reading = []
    for name in plain_methods.names(heads=False):
        entry = registry.load(methods, name, "method.name")
        config = entry.config(entry.Options(), recipes.Origin())
        if entry.observes_attention(config):
            reading.append(name)
    assert reading == ["p_adapter"]
    entry = registry.load(methods, "p_adapter", "method.name")
    assert not entry.observes_attention(entry.Config(sublayers=["ffn"])), "no attention is adapted"
