"""A recipe is typed: what it says is what runs, and what it cannot mean is refused in one line."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import mmpeft_ds
from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe import elsewhere
from mmpeft_ds.recipe.options import EngineOptions, MonitorOptions, OptimOptions

MINIMAL = {"run_dir": "runs/x", "backbone": {"name": "features"}, "method": {"name": "lora"}}


@pytest.fixture
def write(tmp_path):
    def _write(**sections) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **sections}))
        return path

    return _write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        recipes.load(path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_filled_in_and_given_values_kept(write):
    recipe = recipes.load(write(optim={"lr": 0.5, "betas": [0.8, 0.9]}, data={"sources": [{"dir": "d"}]}))
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.epochs) == (0.5, (0.8, 0.9), 1)
    assert recipe.data.sources[0].dir == "d" and recipe.data.sources[0].split == "train"


def test_one_e_minus_three_is_a_number_in_file_and_override(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("run_dir: x\nbackbone: {name: features}\nmethod: {name: lora}\noptim: {lr: 1e-3}\n")
    assert recipes.load(path).optim.lr == 1e-3
    assert recipes.load(path, ["optim.lr=3E-4"]).optim.lr == 3e-4


def test_an_integer_may_stand_for_a_number_but_not_a_truth_value_or_text(write):
    assert recipes.load(write(optim={"clip": 1})).optim.clip == 1.0
    assert "data.workers: expected an integer" in refusal(write(data={"workers": True}))
    assert "data.workers: expected an integer" in refusal(write(data={"workers": "2"}))
    assert "data.workers: expected an integer" in refusal(write(data={"workers": 2.5}))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optmi": {}}, ["r.yaml", "optmi", "unknown key", "'optim'"]),
        ({"optim": {"lrr": 1}}, ["r.yaml", "optim.lrr", "'lr'"]),
        ({"data": {"sources": [{"dir": "d"}, {"dirr": "e"}]}}, ["data.sources.1.dirr", "'dir'"]),
        ({"data": {"sources": [{"split": "train"}]}}, ["data.sources.0", "'dir' is missing", "Add"]),
        ({"data": {"sources": {"dir": "d"}}}, ["data.sources", "expected a list"]),
        ({"data": {"last_batch": "padd"}}, ["data.last_batch", "pad, drop", '"padd"']),
        ({"optim": {"lr": "fast"}}, ["optim.lr", "expected a number", '"fast"']),
        ({"optim": 3}, ["optim", "expected a mapping"]),
        ({"engine": {"micro_batch": 8}}, ["engine.micro_batch", "data.global_batch and optim.accumulation"]),
        ({"engine": {"device": "cpu"}}, ["engine.device", "CUDA_VISIBLE_DEVICES"]),
        ({"optim": {"learning_rate": 1}}, ["optim.learning_rate", "optim.lr"]),
        ({"engine": {"bf16": True}}, ["engine.bf16", "engine.dtype: bfloat16"]),
        ({"batch_size": 8}, ["batch_size", "data.global_batch"]),
        ({"seed": None}, ["seed", "expected an integer", "null"]),
    ],
)
def test_a_wrong_key_or_type_is_named_with_file_key_and_remedy(write, sections, words):
    line = refusal(write(**sections))
    assert all(word in line for word in words), line


def test_what_other_trainers_call_a_key_leads_to_one_that_exists():
    """Every key that the hints name is one of a recipe, or a section."""
    known = {f.name for f in fields(recipes.Recipe)}
    of = {"data": DataOptions, "optim": OptimOptions, "engine": EngineOptions, "monitor": MonitorOptions}
    for name, here in elsewhere.KEYS.items():
        for key in re.findall(r"\b(?:data|optim|engine|monitor)\.\w+", here) or [here.split(" ")[0].split(".")[0]]:
            section, _, option = key.partition(".")
            assert section in known | {"nothing"}, (name, here)
            assert not option or option in {f.name for f in fields(of[section])}, (name, here)


@pytest.mark.parametrize(
    ("method", "name", "says"),
    [
        ("lora", "rank", "Here that is 'r'"),
        ("coop", "num_virtual_tokens", "Here that is 'context'"),
        ("deep_prompt", "num_virtual_tokens", "Here that is 'length'"),
        ("mmrl", "num_tokens", "Here that is 'tokens'"),
        ("p_adapter", "target_modules", "Here the places are chosen by 'sublayers', 'tower', 'layers'"),
        ("routed_lora", "target_modules", "Here the places are chosen by 'targets', 'tower', 'layers'"),
        ("peft", "rank", "stand below `options`: options.rank"),
        ("clip_adapter", "rank", "unknown key. Known: name, ratio"),  # nothing there is a rank
        ("lora", "num_virtual_tokens", "unknown key. Known: name, r,"),
    ],
)
def test_an_option_that_other_libraries_call_otherwise_leads_to_the_methods_own(write, method, name, says):
    with pytest.raises(BadInput) as refused:
        recipes.filled(recipes.load(write(method={"name": method, name: 1})))
    assert says in str(refused.value)


def test_the_config_of_a_method_says_so_too():
    with pytest.raises(TypeError, match="'rank'. Here that is 'r'. Known: "):
        mmpeft_ds.PAdapterConfig(rank=8)
    with pytest.raises(TypeError, match="'lenght'. Did you mean 'length'"):
        mmpeft_ds.DeepPromptConfig(lenght=8)


def test_keys_of_a_component_that_set_replaced_are_said_to_be_the_former_ones(write):
    path = write(method={"name": "routed_lora", "route": "mul"}, backbone={"name": "clip"})
    line = refusal(path, "method.name=ga_net")
    assert "r.yaml: method.route: belongs to 'routed_lora'" in line and "--set method.name" in line
    assert "--set 'method={name: " in line
    line = refusal(path, "method.routee=mul")
    assert "belongs" not in line and "Did you mean 'route'" in line


def test_a_missing_required_key_is_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("backbone: {name: features}\nmethod: {name: lora}\n")
    assert "'run_dir' is missing" in refusal(path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- a\n- b\n", "instead of a mapping"),
        ("a: [1", "line"),
        ("seed: 1\nseed: 2\n", "twice"),
        ("a:\n\t- b\n", "line 2"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, word):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    line = refusal(path)
    assert str(path) in line and word in line


def test_what_is_done_to_a_recipe_that_was_read_does_not_reach_the_next_reader(write):
    path = write(data={"sources": [{"dir": "a"}]})
    raw, _ = recipes.read(path, ["data.sources.0.dir=b"])
    raw["data"]["sources"].append("c")
    assert recipes.read(path, [])[0]["data"]["sources"] == [{"dir": "a"}]
    path.write_text(path.read_text().replace("dir: a", "dir: d"))
    assert recipes.read(path, [])[0]["data"]["sources"] == [{"dir": "d"}]


def test_a_missing_or_binary_file_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "UTF-8" in refusal(tmp_path / "b.yaml")


def test_overrides_reach_nested_keys_and_list_elements(write):
    path = write(data={"sources": [{"dir": "a"}, {"dir": "b"}]})
    recipe = recipes.load(path, ["data.sources.1.dir=c", "backbone.images=live", "optim.betas=[0.5, 0.6]", "seed=7"])
    assert [s.dir for s in recipe.data.sources] == ["a", "c"]
    assert (
        recipe.backbone == {"name": "features", "images": "live"}
        and recipe.optim.betas == (0.5, 0.6)
        and recipe.seed == 7
    )


def test_a_later_override_wins(write):
    assert recipes.load(write(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", ["--set optim.lr", "key=value"]),
        ("=3", ["key=value"]),
        ("data.sources.5.dir=x", ["--set data.sources.5.dir", "1 element"]),
        ("data.sources.first.dir=x", ["'first' is no index"]),
        ("optim.lrr=1", ["--set optim.lrr", "'lr'"]),
        ("optim.lr=fast", ["--set optim.lr", "expected a number"]),
        ("optim.lr=[1", ["--set optim.lr", "not valid YAML"]),
        ("run_dir.x=1", ["--set run_dir.x", "no keys below"]),
    ],
)
def test_a_wrong_override_is_named_as_such_and_not_blamed_on_the_file(write, override, words):
    line = refusal(write(data={"sources": [{"dir": "a"}]}), override)
    assert all(word in line for word in words), line
    assert "r.yaml" not in line


def test_printed_recipe_reads_back_equal(write, tmp_path):
    recipe = recipes.load(write(optim={"betas": [0.8, 0.9], "no_decay": ["a"]}, data={"sources": [{"dir": "ä b"}]}))
    again = tmp_path / "again.yaml"
    again.write_text(recipes.to_yaml(recipe))
    assert recipes.load(again) == recipe
    assert recipes.from_dict(recipes.to_dict(recipe)) == recipe


def test_a_study_is_sent_to_its_launcher(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("run_dir: x\nfew_shot: {shots: [1]}\nmethods: []\n")
    with pytest.raises(BadInput, match="launchers/few_shot.py --recipe"):
        recipes.load(path)
