"""Every option of peft's own LoRA and (IA)^3 ends in an adapter that is what was trained, or is refused by name.

A field that a new version of peft brings fails here until it is decided.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from mmpeft_ds import adapter, merging, methods
from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import checkpoint
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.assembly.build import FrozenEngine, check_trainables
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.layers import kept_buffers
from mmpeft_ds.methods.ia3.options import IA3Options
from mmpeft_ds.methods.lora.options import REFUSED, REFUSED_STARTS, LoraOptions
from mmpeft_ds.sites import Sites, find_sites
from tests.helpers import ROOT
from tests.helpers.models import tiny_clip
from tests.helpers.models.tiny_zoo import ZOO, output
from tests.helpers.runs import tiny_classifier

# Fields of every peft config, which peft fills in by itself.
PEFTS = {f.name for f in dataclasses.fields(peft.PeftConfig)}
TOKENS = {"word_embeddings": [1, 6]}
BLOCKS = {"target_modules_bd_a": ["query"], "target_modules_bd_b": ["value"], "nblocks": 2}
# field -> settings with which it is trained; those of a refused one, and what the line says
LORA_WORKS: dict[str, list[dict[str, Any]]] = {
    "target_parameters": [{"target_parameters": ["query.weight"]}],
    "r": [{"r": 3}],
    "target_modules": [{"target_modules": ["query", "dense"]}, {"target_modules": ".*query"}],
    "exclude_modules": [{"target_modules": ["query", "value"], "exclude_modules": ["value"]}],
    "lora_alpha": [{"lora_alpha": 3}],
    "lora_dropout": [{"lora_dropout": 0.3}],
    "fan_in_fan_out": [],  # found by itself: see the test with GPT-2
    "bias": [{"bias": "lora_only"}],
    "use_rslora": [{"use_rslora": True}],
    "modules_to_save": [{"modules_to_save": ["embeddings.LayerNorm"]}],
    "init_lora_weights": [
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "lora_dropout": 0.2},
        {"init_lora_weights": "olora", "lora_alpha": 3},
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"query": 5},
            "alpha_pattern": {"value": 3},
        },
    ],
    "layers_to_transform": [{"layers_to_transform": [1]}, {"layers_to_transform": 1}],
    "layers_pattern": [
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
        {"layers_to_transform": [0], "layers_pattern": "layer"},
    ],
    "rank_pattern": [{"rank_pattern": {"query": 5}}],
    "alpha_pattern": [{"alpha_pattern": {"query": 5}}],
    "trainable_token_indices": [{"trainable_token_indices": TOKENS}, {"trainable_token_indices": [1, 6]}],
    "use_dora": [{"use_dora": True}],
    "lora_bias": [{"lora_bias": True}],
    "use_bdlora": [{"use_bdlora": BLOCKS}],
    "eva_config": [],  # see test_lora_eva.py
    "corda_config": [],  # and these test_lora_data_starts.py
    "lora_ga_config": [],
}
OURS = {"start_batches"}
ONLY_FLOAT32 = {"bias", "modules_to_save"}
LORA_REFUSED: dict[str, dict[str, Any]] = {
    "loftq_config": {"loftq_config": {"loftq_bits": 4}},
    "megatron_config": {"megatron_config": {"a": 1}},
    "megatron_core": {"megatron_core": "other"},
    "velora_config": {"velora_config": {"num_groups": 4}},
    "monteclora_config": {"monteclora_config": {}},
    "kasa_config": {"kasa_config": {}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "use_qalora": {"use_qalora": True},
    "qalora_group_size": {"qalora_group_size": 4},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "runtime_config": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "arrow_config": {"arrow_config": {}},
    "ensure_weight_tying": {"ensure_weight_tying": True},
}
IA3_WORKS: dict[str, list[dict[str, Any]]] = {
    "target_modules": [{"target_modules": ["key", "value"], "feedforward_modules": []}],
    "exclude_modules": [
        {"target_modules": ["key", "value"], "feedforward_modules": [], "exclude_modules": ["value"]},
    ],
    "feedforward_modules": [{"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]}],
    "fan_in_fan_out": [],
    "modules_to_save": [{"modules_to_save": ["embeddings.LayerNorm"]}],
    "init_ia3_weights": [{"init_ia3_weights": False}, {}],
}
# What starts or casts by itself is quick on a bfloat16 base too; the rest of those is slow.
HALF = {"init_lora_weights", "use_dora", "trainable_token_indices"}
TRAINED = [
    pytest.param(name, settings, dtype, marks=[pytest.mark.slow] if dtype == "bfloat16" and field not in HALF else [])
    for name, table in (("lora", LORA_WORKS), ("ia3", IA3_WORKS))
    for field, cases in table.items()
    for settings in cases
    for dtype in ("float32", "bfloat16")
    if not (dtype == "bfloat16" and field in ONLY_FLOAT32)
]


def test_every_field_of_peft_is_decided_and_offered():
    decided = {"lora": (peft.LoraConfig, LORA_WORKS.keys() | LORA_REFUSED.keys()), "ia3": (peft.IA3Config, IA3_WORKS)}
    for name, (config, fields) in decided.items():
        there = {f.name for f in dataclasses.fields(config)} - PEFTS
        assert there == set(fields) == set(methods.get(name).Options.own_fields()) - OURS, name
    assert LORA_REFUSED.keys() == REFUSED.keys() and not LORA_WORKS.keys() & REFUSED.keys()


def test_every_start_that_peft_names_is_decided():
    hint = next(f for f in dataclasses.fields(peft.LoraConfig) if f.name == "init_lora_weights")
    named = {value for value in ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica")}
    assert all(value in str(hint.type) for value in named)
    listed = str(hint.type).split("[", 1)[1].rsplit("]", 1)[0].replace("pissa_niter_[number of iters]", "")
    assert {part.strip(" '\"") for part in listed.split(",")} - {""} == named
    assert named - REFUSED_STARTS.keys() == named - {"mica"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("peft_options")
    tiny_classifier.make_towers(path)
    return path


def logits(model: torch.nn.Module, backbone: Any) -> Tensor:
    return merging.outputs(model.eval(), backbone, merging.probe(backbone))[0]


@pytest.mark.parametrize(
    ("name", "settings", "dtype"), TRAINED, ids=lambda part: str(part).replace(" ", "") if part else "plain"
)
def test_two_steps_with_an_option_are_what_its_adapter_says_on_a_fresh_base(folder, tmp_path, name, settings, dtype):
    recipe = tiny_classifier.make_recipe(folder, method={"name": name, **settings}, engine__dtype=dtype)
    recipes.components(recipe).method.options.check_training(dtype, 0)
    resolved = tiny_classifier.make_resolved(recipes.filled(recipe), tiny_classifier.TinyTask())
    backbone = resolved.backbone
    frozen, base, fresh = logits(backbone.build(), backbone), backbone.build(), backbone.build()
    kept = {path: p.clone() for path, p in base.named_parameters()}
    torch.manual_seed(7)
    model = resolve.attach(resolved, base).train()
    trainables = {path: p for path, p in model.named_parameters() if p.requires_grad}
    check_trainables(trainables)
    optimizer = torch.optim.Adam(trainables.values(), 0.05)
    for _ in range(2):
        forward(model, backbone, merging.probe(backbone)).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model, backbone)
    assert (trained - frozen).abs().max() > 0.1
    if settings.get("bias") is None:  # else peft trains those of the base itself
        bare = {path.replace(".base_layer", "").replace(".token_adapter", ""): p
                for path, p in model.get_base_model().named_parameters() if not p.requires_grad}  # fmt: skip
        assert all(torch.equal(bare[path], p) for path, p in kept.items() if path in bare)
    resolved.train = resolved.validation = []
    export_adapter(tmp_path / "adapter", model, resolved, {})
    assert torch.equal(logits(adapter.load(tmp_path / "adapter").model, backbone), trained)
    resolve.float32_heads(fresh)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter"), backbone), trained)


@pytest.mark.parametrize("settings", LORA_REFUSED.values(), ids=LORA_REFUSED)
def test_what_does_not_work_is_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(BadInput, match=f"^{name}: is not offered: .+") as refused:
        LoraOptions(**settings).check_training("float32", 0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "dtype", "stage", "says"),
    [
        *(({"init_lora_weights": start}, "float32", 0, f"{start}.* is not offered") for start in REFUSED_STARTS),
        ({"init_lora_weights": "eva"}, "float32", 3, "^init_lora_weights: 'eva' is not offered at ZeRO stage 3"),
        ({"init_lora_weights": "eva", "rank_pattern": {"q": 2}}, "float32", 0, "^rank_pattern: does not go with"),
        ({"eva_config": {"rho": 1.0}}, "float32", 0, "^eva_config: is of init_lora_weights: eva, not True"),
        ({"init_lora_weights": "pisa"}, "float32", 0, "no such start.*pissa_niter_4"),
        ({"init_lora_weights": "pissa_niter_x"}, "float32", 0, "no such start"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "float32", 0, "^use_dora: does not go with"),
        ({"init_lora_weights": "olora", "lora_bias": True}, "float32", 0, "^lora_bias: does not go with"),
        ({"lora_alpha": 0}, "float32", 0, "^lora_alpha: 0 leaves the low-rank term out"),
        ({"lora_dropout": 1.0}, "float32", 0, "^lora_dropout: 1 drops all"),
        ({"bias": "all"}, "float32", 0, "^bias: all is not offered.*bitfit"),
        ({"bias": "lora_only"}, "bfloat16", 0, "^bias: .*bfloat16.*bitfit"),
        ({"modules_to_save": ["pooler"]}, "bfloat16", 0, "^modules_to_save: .*pooler in bfloat16"),
        ({"trainable_token_indices": [1]}, "float32", 3, "^trainable_token_indices: .*stage 3"),
    ],
)
def test_values_that_do_not_work_are_refused_with_the_remedy(settings, dtype, stage, says):
    with pytest.raises(BadInput, match=says):
        LoraOptions(**settings).check_training(dtype, stage)


def test_ia3_refuses_half_precision_copies():
    IA3Options(modules_to_save=["pooler"]).check_training("float32", 3)
    with pytest.raises(BadInput, match="pooler in bfloat16"):
        IA3Options(modules_to_save=["pooler"]).check_training("bfloat16", 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["nothing"]}, "recipe: method: .*target_modules"),
        ({"modules_to_save": ["nothing"]}, "recipe: method.modules_to_save: .*'nothing'"),
        (
            {"target_modules": ["query", "valeu"]},
            "target_modules: 'valeu' fits no module. Did you mean 'value'",
        ),
        ({"target_modules": ["query"], "exclude_modules": ["nothing"]}, "method.exclude_modules: 'nothing' fits no"),
        ({"target_modules": ["query"], "layers_to_transform": [0, 9]}, "method.layers_to_transform: '9' fits no"),
        ({"rank_pattern": {"query": 4, "nothing": 3}}, "recipe: method.rank_pattern: 'nothing' fits no adapted layer"),
        ({"alpha_pattern": {"key": 3}}, "recipe: method.alpha_pattern: 'key' fits no adapted layer"),
        ({"trainable_token_indices": [1, 99]}, "method.trainable_token_indices: 99 is no token of .* 0 to 13"),
        ({"trainable_token_indices": {"word_embeddings": [-1]}}, "method.trainable_token_indices: -1 is no token"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "recipe: method: .*even"),
        ({"init_lora_weights": "pissa", "r": 17}, "recipe: method: r: 17 is more than the 16 singular values"),
        (
            {"init_lora_weights": "pissa", "target_modules": ["word_embeddings"]},
            "recipe: method: init_lora_weights: pissa cannot start at .*word_embeddings .Embedding.",
        ),
    ],
)
def test_what_only_the_model_can_tell_is_one_line_before_training(folder, settings, says):
    recipe = tiny_classifier.make_recipe(folder, method={"name": "lora", **settings})
    resolved = tiny_classifier.make_resolved(recipes.filled(recipe), tiny_classifier.TinyTask())
    for on_meta in (True, False):  # as --check, and as a run
        with pytest.raises(BadInput, match=says), torch.device("meta" if on_meta else "cpu"):
            resolve.check_new(resolved, resolve.attach(resolved, resolved.backbone.build(on_meta=on_meta)))


def test_tokens_of_a_model_that_has_several_embeddings_are_refused_in_one_line(folder, tmp_path):
    backbone = {"name": "clip", "model": tiny_clip.write(tmp_path, "clip")}
    method = {"name": "lora", "target_modules": ["q_proj"], "trainable_token_indices": [1]}
    recipe = recipes.filled(tiny_classifier.make_recipe(folder, method=method, backbone=backbone))
    resolved = tiny_classifier.make_resolved(recipe, tiny_classifier.TinyTask())
    with pytest.raises(BadInput, match="recipe: method: .*get_input_embeddings"), torch.device("meta"):
        resolve.attach(resolved, resolved.backbone.build(on_meta=True))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2"])
def test_a_start_works_on_weights_that_are_stored_in_by_out(start):
    """GPT-2's Conv1D; peft's OLoRA does not turn such weights and is refused."""
    lora = methods.get("lora")
    base = ZOO["gpt2"].build()
    frozen = output(base, ZOO["gpt2"])
    config = lora.prepare(peft.LoraConfig(r=2, init_lora_weights="pissa"), base, find_sites(base))
    config.init_lora_weights = start
    model = lora.attach(config, base)
    torch.testing.assert_close(output(model, ZOO["gpt2"]), frozen, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(output(model, ZOO["gpt2"]), frozen)
    config.init_lora_weights = "olora"
    with pytest.raises(BadInput, match="olora cannot start at .*Conv1D"):
        lora.attach(config, ZOO["gpt2"].build())


def test_a_start_is_the_one_that_peft_computes(folder):
    """PiSSA by peft itself: the same factors, and the same outputs but for rounding."""
    recipe = tiny_classifier.make_recipe(folder, method={"name": "lora", "init_lora_weights": "pissa"})
    resolved = tiny_classifier.make_resolved(recipes.filled(recipe), tiny_classifier.TinyTask())
    model = resolve.attach(resolved, resolved.backbone.build())
    base = resolved.backbone.build()
    resolve.float32_heads(base)
    config = resolved.method.prepare(resolved.method_config, base, find_sites(base))
    theirs = peft.get_peft_model(base, config)
    ours = dict(model.named_parameters())
    factors = {path: p for path, p in theirs.named_parameters() if ".lora_" in path}
    assert factors and all(torch.equal(ours[path], p) for path, p in factors.items())
    generator = torch.Generator().manual_seed(1)
    for path, p in factors.items():  # both trained alike
        change = torch.randn(p.shape, generator=generator)
        p.data += change
        ours[path].data += change
    one, other = (logits(m, resolved.backbone) for m in (model, theirs))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_run_that_goes_on_finds_its_start_again(folder, tmp_path):
    """Also where another one would be drawn, as on another machine; test_lora_starts_ranks.py trains so."""
    method = {"name": "lora", "r": 3, "init_lora_weights": "pissa_niter_1"}
    recipe = tiny_classifier.make_recipe(folder, method=method)
    models = []
    for seed in (0, 1):
        resolved = tiny_classifier.make_resolved(recipes.filled(recipe), tiny_classifier.TinyTask())
        torch.manual_seed(seed)
        models.append(resolve.attach(resolved, resolved.backbone.build()))
    first, second = map(kept_buffers, models)
    assert first and all((second[name] - start).abs().max() > 1e-3 for name, start in first.items())
    engines = [FrozenEngine(model, Ranks(0, 1, 0, 1, torch.device("cpu"))) for model in models]
    path = checkpoint.save(tmp_path, engines[0], {}, TrainState(), recipe={}, fingerprint={}, keep_last=1)
    checkpoint.load(path, engines[1], {})
    assert all(torch.equal(second[name], start) for name, start in first.items())


def test_a_refusal_needs_no_torch(tmp_path):
    """The whole command, with data sets that are not prepared: the option is said first."""
    code = (
        "import sys; from mmpeft_ds import recipe; from mmpeft_ds.engine.assembly.outline import outline\n"
        "try: outline(recipe.load(sys.argv[1], ['method={name: lora, init_lora_weights: mica}']))\n"
        "except Exception as e: print(e)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "recipes" / "quickstart.yaml")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert "method: init_lora_weights: 'mica' is not offered: one of its factors" in done.stdout


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"target_parameters": ["no_such.weight"]}, "target_parameters: 'no_such.weight' fits no weight of the model"),
        ({"target_parameters": ["weight"], "lora_dropout": 0.1}, "lora_dropout: does not go with target_parameters"),
        ({"target_parameters": ["weight"], "use_dora": True}, "use_dora: does not go with target_parameters"),
        ({"target_parameters": ["weight"], "init_lora_weights": "pissa"}, "init_lora_weights: pissa: not with"),
    ],
)
def test_parameters_that_cannot_be_targets_are_refused_in_one_line(settings, told):
    lora = methods.get("lora")
    with pytest.raises(BadInput, match=told) as error:
        LoraOptions(**settings).check_training("float32", 2)
        lora.prepare(peft.LoraConfig(**settings), torch.nn.Linear(2, 2), Sites())
    assert "\n" not in str(error.value)


def test_parameters_are_no_targets_at_stage_3():
    with pytest.raises(BadInput, match="target_parameters: not offered at ZeRO stage 3"):
        LoraOptions(target_parameters=["experts.down_proj"]).check_training("float32", 3)
