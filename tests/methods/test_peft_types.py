"""Every type of peft through method `peft`: tried on a backbone, or refused by name; where the sites place it."""

from __future__ import annotations

import copy
import importlib.util
import re

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from mmpeft_ds import methods
from mmpeft_ds.engine.assembly.resolve import make_method
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.peft.kinds import KINDS
from mmpeft_ds.recipe.components import Section
from mmpeft_ds.recipe.parse import Origin
from mmpeft_ds.sites import find_sites
from tests.helpers import peft_table
from tests.helpers.method_table import BEGIN, END, Column
from tests.helpers.models.tiny_zoo import ZOO

NEEDS = {"adamss": "sklearn"}


@pytest.fixture(scope="module")
def column(tmp_path_factory) -> Column:
    with peft_table.small_towers():
        return Column.make("vision_text_encoder", tmp_path_factory.mktemp("column"))


def test_every_type_of_peft_is_decided():
    assert set(KINDS) == {kind.value.lower() for kind in peft.PeftType}


@pytest.mark.parametrize("name", peft_table.OFFERED)
def test_a_type_trains_leaves_the_base_alone_and_is_loaded_by_peft_to_the_bit(column, name):
    needed = NEEDS.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        with pytest.raises(BadInput, match=r"^recipe: method.type: adamss: scikit-learn is required[^\n]*$"):
            peft_table.try_on(name, column)
        return
    peft_table.try_on(name, column)


@pytest.mark.parametrize("name", [n for n in peft_table.OFFERED if n not in NEEDS])
def test_a_type_is_attached_without_weights_as_a_check_does_it_and_has_the_same_parameters(column, name):
    bare = copy.copy(column)
    bare.model = copy.deepcopy(column.model).to("meta")
    with torch.device("meta"):
        if KINDS[name].weights:
            with pytest.raises(BadInput, match=rf"^type: {name} needs the frozen weights[^\n]+\.$"):
                peft_table.attach(name, bare)
            return
        model, _ = peft_table.attach(name, bare)
    real, _ = peft_table.attach(name, column)
    shapes = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (model, real)]
    assert shapes[0] == shapes[1] and shapes[0]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.refused])
def test_a_type_that_cannot_work_here_is_refused_in_one_line_with_the_reason(name):
    chosen = peft_table.section(name)
    with pytest.raises(BadInput, match=rf"^type: {name} is not offered: .+\.$"):
        chosen.options.check_training("float32", 0)
    with pytest.raises(BadInput, match=f"method.type: {name} is not offered"):
        make_method(chosen)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "type: is missing. Name one of lora"),
        ({"type": "lohaa"}, "type: peft has no 'lohaa'. Did you mean 'loha'"),
        ({"type": "loha", "options": {"alhpa": 3}}, "method.options.alhpa: unknown key. Did you mean 'alpha'"),
        ({"type": "loha", "options": {"peft_type": "LORA"}}, "method.options.peft_type: unknown key"),
        ({"type": "loha", "options": {"r": "many"}}, "method.options.r: expected an integer"),
        ({"type": "lora", "options": {"rnk": 3}}, "method.options.rnk: unknown key"),
        ({"type": "loha", "targets": ["z"]}, "targets: 'z' is unknown. Known: q, k, v"),
        ({"type": "loha", "tower": "text", "options": {"target_modules": ["x"]}}, "tower: options.target_modules"),
        ({"type": "adamss", "options": {"use_asa": True}}, "options.use_asa: True is not offered"),
        ({"type": "lora", "options": {"init_lora_weights": "mica"}}, "options.init_lora_weights: 'mica' is not"),
        ({"type": "lora", "options": {"velora_config": {"a": 1}}}, "options.velora_config: is not offered"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_names_the_key(given, says):
    with pytest.raises(BadInput, match=re.escape(says)) as refused:
        section = Section.read(methods, {"name": "peft", **given}, "method", Origin())
        section.options.check_training("float32", 0)
        make_method(section)
    assert "\n" not in str(refused.value)


def test_what_needs_whole_weights_at_once_is_refused_at_stage_3():
    for name in (name for name, kind in KINDS.items() if kind.stage3):
        with pytest.raises(BadInput, match=f"^type: {name} is not offered at ZeRO stage 3"):
            peft_table.section(name).options.check_training("float32", 3)


def paths(model: torch.nn.Module, **given: object) -> set[str]:
    chosen = Section.read(methods, {"name": "peft", **given}, "method", Origin())
    method, config = make_method(chosen)
    return method.prepare(config, model, find_sites(model)).target_modules


def test_the_sites_say_where_unless_the_recipe_does():
    model = ZOO["llama"].build()
    assert {p.rsplit(".", 1)[1] for p in paths(model, type="loha")} == {"q_proj", "v_proj"}
    ffn = paths(model, type="loha", targets=["up", "gate", "down", "out"], layers=[1])
    assert {p.rsplit(".", 1)[1] for p in ffn} == {"up_proj", "gate_proj", "down_proj", "o_proj"} and len(ffn) == 4
    assert all(".1." in p for p in ffn)
    assert {p.rsplit(".", 1)[1] for p in paths(model, type="ln_tuning")} == {
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert paths(model, type="loha", options={"target_modules": ["k_proj"]}) == {"k_proj"}
    assert all(".0." in p for p in paths(model, type="loha", options={"layers_to_transform": [0]}))
    with pytest.raises(BadInput, match="targets: the chosen layers have none of gate"):
        paths(ZOO["bert"].build(), type="loha", targets=["gate"])


def test_a_type_that_changes_the_frozen_weights_is_refused_when_it_is_attached(column, monkeypatch):
    loha = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LOHA]

    class Changing(loha):
        def _create_and_replace(self, config, adapter_name, target, *args, **kwargs):
            super()._create_and_replace(config, adapter_name, target, *args, **kwargs)
            target.weight.data[0, 0] += 1

    peft_table.attach("loha", column)  # control
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LOHA, Changing)
    with pytest.raises(BadInput, match="loha changes the frozen weights when it is attached"):
        peft_table.attach("loha", column)
    assert PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LOHA] is Changing, "what is registered stays"


def test_what_would_train_in_half_precision_is_refused(column):
    method, config = make_method(peft_table.section("ln_tuning"))
    model = ZOO["bert"].build().to(torch.bfloat16)
    with pytest.raises(BadInput, match="ln_tuning trains .* in half precision.*float32"):
        method.attach(method.prepare(config, model, find_sites(model)), model)


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_is_tried_now():
    page = peft_table.PAGE.read_text("utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == peft_table.table().strip()
