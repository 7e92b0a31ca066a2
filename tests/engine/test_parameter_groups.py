"""Groups of parameters: learning rates, decays and the optimiser of each, LoRA+ and what muon takes."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from mmpeft_ds.engine.assembly.checks import check_values
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.deep_prompt.method import DeepPrompt
from mmpeft_ds.methods.graph_lora.method import GraphLora
from mmpeft_ds.methods.lora.method import Lora
from mmpeft_ds.methods.peft.method import Peft
from mmpeft_ds.methods.task_res.method import TaskRes
from tests.helpers.runs.optim_recipe import recipe

D = 5


def adapted() -> nn.Module:
    """LoRA on two matrices and an embedding, a bias and a head that train whole."""
    base = nn.ModuleDict({"token": nn.Embedding(7, D), "q": nn.Linear(D, D), "head": nn.Linear(D, 3)})
    config = peft.LoraConfig(r=2, target_modules=["q", "token"], modules_to_save=["head"], lora_bias=False)
    return peft.get_peft_model(base, config)


def rates(module: nn.Module, groups: list[dict], lr: float) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names[id(p)]: (pytest.approx(lr * group["lr_share"]), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def test_lora_plus_gives_the_learning_rates_of_pefts_own():
    module = adapted()
    theirs = create_loraplus_optimizer(module, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    groups = optimizers.parameter_groups(trained(module), recipe(lr=0.01, lora_plus=16))
    found = {id(p): 0.01 * group["lr_share"] for group in groups for p in group["params"]}
    assert found == pytest.approx(expected) and len(set(expected.values())) == 3


def test_a_pattern_has_its_own_rate_and_decay_and_the_first_that_fits_decides():
    module = adapted()
    given = {
        "*.lora_A.*": {"lr": 0.5},
        "*.lora_*": {"weight_decay": 0.25},
        "*.head.*bias": {"lr": 0.0, "weight_decay": 0.5},
    }
    groups = optimizers.parameter_groups(trained(module), recipe(lr=0.1, weight_decay=0.01, groups=given))
    found = rates(module, groups, 0.1)
    of = lambda part: next(value for name, value in found.items() if part in name)  # noqa: E731
    assert of(".q.lora_A.") == (0.5, 0.01) and of(".q.lora_B.") == (0.1, 0.25)
    assert of("head.modules_to_save.default.bias") == (0.0, 0.5) and of("default.weight") is not None
    assert sorted(found) == sorted(trained(module))


@pytest.mark.parametrize(
    ("optim", "told"),
    [
        ({"groups": {"*.lora_C.*": {"lr": 0.1}}}, r"optim.groups: '\*.lora_C.\*' fits no trained parameter.*lora_"),
        (
            {"groups": {"*": {"lr": 0.1}, "*.lora_A.*": {"lr": 0.2}}},
            r"'\*.lora_A.\*' fits no trained parameter, or only",
        ),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(optim, told):
    with pytest.raises(BadInput, match=told) as refused:
        optimizers.parameter_groups(trained(adapted()), recipe(**optim))
    assert "\n" not in str(refused.value)


def test_lora_plus_without_lora_is_refused():
    with pytest.raises(BadInput, match="optim.lora_plus: is for LoRA"):
        optimizers.parameter_groups(dict(nn.Linear(D, 3).named_parameters()), recipe(lora_plus=4))


@pytest.mark.parametrize(
    ("optim", "told"),
    [
        ({"groups": {"*": {"rate": 1}}}, "optim.groups.*: unknown key"),
        ({"groups": {"*": {"lr": "high"}}}, "optim.groups.*.lr: expected"),
        ({"groups": ["*"]}, "optim.groups: expected a mapping"),
    ],
)
def test_wrong_settings_of_a_group_are_refused_by_key(optim, told):
    with pytest.raises(BadInput, match=told):
        recipe(**optim)


def test_a_negative_rate_of_a_group_is_refused():
    with pytest.raises(BadInput, match="lr of 'x' must be 0 or more"):
        check_values(recipe(groups={"x": {"lr": -1.0}}))


def test_muon_takes_matrices_of_adapters_and_adamw_what_is_a_table_a_vector_or_a_head():
    module = adapted()
    groups = optimizers.parameter_groups(trained(module), recipe(name="muon", lr=0.1), is_map=Lora.is_map)
    names = {id(p): name for name, p in module.named_parameters()}
    of_muon = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    assert of_muon == {f"base_model.model.q.lora_{ab}.default.weight" for ab in "AB"}
    given = {"*head*": {"optimizer": "muon"}, "*.q.lora_B.*": {"optimizer": "adamw", "lr": 0.3}}
    changed = recipe(name="muon", lr=0.1, groups=given, muon={"adamw_lr": 0.02})
    groups = optimizers.parameter_groups(trained(module), changed, is_map=Lora.is_map)
    found = {names[id(p)]: (group["muon"], 0.1 * group["lr_share"]) for group in groups for p in group["params"]}
    assert found["base_model.model.head.modules_to_save.default.weight"] == (True, pytest.approx(0.1))
    assert found["base_model.model.head.modules_to_save.default.bias"] == (False, pytest.approx(0.02))
    assert found["base_model.model.q.lora_B.default.weight"] == (False, pytest.approx(0.3))


def test_prompts_and_class_vectors_are_tables():
    for method, name in ((DeepPrompt, "layer.0.deep_prompt_k.default.tokens"), (TaskRes, "x.task_res_a.residual")):
        assert method.kind(name) == "peft" and not method.is_map(name)
    assert DeepPrompt.is_map("layer.0.deep_prompt_k.default.inner.weight")
    written = "q.graph_lora.default.0."
    assert not GraphLora.is_map(f"{written}node") and not GraphLora.is_map(f"{written}relation_bias")
    assert GraphLora.is_map(f"{written}gate_weight") and GraphLora.is_map(f"{written}down_weight")


@pytest.mark.parametrize(
    ("config", "of_adamw", "of_muon"),
    [
        (peft.IA3Config(feedforward_modules=[]), {"ia3_l"}, set()),
        (peft.OFTConfig(oft_block_size=4), {"oft_R"}, set()),
        (peft.BOFTConfig(boft_block_size=4), {"boft_R", "boft_s"}, set()),
        (peft.HRAConfig(r=4), {"hra_u"}, set()),
        (peft.RandLoraConfig(r=4), {"randlora_lambda", "randlora_gamma"}, set()),
        (peft.VBLoRAConfig(r=2, vector_length=4), {"vblora_vector_bank", "vblora_logits_A", "vblora_logits_B"}, set()),
        (peft.LoHaConfig(r=2), set(), {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        (peft.LoraConfig(r=1), set(), {"lora_A", "lora_B"}),  # a map, though of one row
    ],
)
def test_of_types_of_peft_muon_takes_what_maps_and_not_vectors_in_the_form_of_a_matrix(config, of_adamw, of_muon):
    config.target_modules = {"0"}
    module = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    found = {True: set(), False: set()}
    for name, p in trained(module).items():
        kind = next(part for part in name.split(".") if part.startswith(tuple(of_adamw | of_muon)))
        found[p.dim() == 2 and Peft.is_map(name)].add(kind)
    assert found == {True: of_muon, False: of_adamw}


@pytest.mark.parametrize(
    ("optim", "told"),
    [
        ({"groups": {"*bias": {"optimizer": "muon"}}}, r"optim.groups: '\*bias' gives muon no matrix"),
        ({"groups": {"*lora*": {"optimizer": "adamw"}}}, "optim.name: muon steps matrices .*, and none trains"),
    ],
)
def test_what_muon_cannot_step_is_refused_in_one_line(optim, told):
    with pytest.raises(BadInput, match=told) as refused:
        optimizers.parameter_groups(trained(adapted()), recipe(name="muon", **optim), is_map=Lora.is_map)
    assert "\n" not in str(refused.value)
