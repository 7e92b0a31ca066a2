"""Recipes of studies: their members, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmpeft_ds import recipe as recipes
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.study import Study

COMMON = {
    "run_dir": "runs/sweep",
    "seed": 7,
    "backbone": {"name": "vision_text_encoder", "vision": "v", "text": "t"},
    "method": {"name": "lora", "r": 8, "lora_alpha": 16},
    "data": {"sources": [{"dir": "data/x"}]},
    "optim": {"lr": 1e-3, "epochs": 2},
}


@pytest.fixture
def load(tmp_path):
    def load(*vary: str, study: object = None, **changes) -> Study:
        raw = COMMON | changes | ({} if study is None else {"study": study})
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
        return Study.load(tmp_path / "r.yaml", [], list(vary))

    return load


def test_an_entry_is_laid_over_the_recipe_and_another_method_replaces_the_section(load):
    study = load(study=[{"name": "a", "optim": {"lr": 0.1}}, {"name": "b", "method": {"name": "adapter"}, "seed": 1}])
    a, b = study.members.values()
    assert (a.optim.lr, a.optim.epochs, a.method["r"], a.seed) == (0.1, 2, 8, 7)
    assert (b.method["name"], "r" in b.method, b.optim.lr, b.seed) == ("adapter", False, 1e-3, 1)
    assert [Path(m.run_dir) for m in (a, b)] == [Path("runs/sweep/a"), Path("runs/sweep/b")]
    assert a.data.seed == b.data.seed == 7


def test_varied_keys_give_every_combination_and_differing_settings_alone_are_listed(load):
    study = load("optim.lr=1e-3,3e-4", "method.r=4,8", "seed=0")
    assert list(study.members) == ["lr0.001-r4-seed0", "lr0.001-r8-seed0", "lr0.0003-r4-seed0", "lr0.0003-r8-seed0"]
    assert study.settings["lr0.0003-r4-seed0"] == {"optim.lr": 3e-4, "method.r": 4}
    assert all(member.seed == 0 and member.data.seed == 7 for member in study.members.values())


def test_entries_and_varied_keys_go_together_and_a_data_seed_stays(load):
    study = load("method={name: lora, r: 4},{name: adapter}", study=[{"name": "x", "seed": 3}], data={"seed": 11})
    assert list(study.members) == ["x-lora", "x-adapter"]
    assert [m.data.seed for m in study.members.values()] == [11, 11]


@pytest.mark.parametrize(
    ("vary", "study", "words"),
    [
        ([], None, "has no section `study`"),
        ([], [], "expected a list of mappings with a `name`"),
        ([], {"name": "a"}, "expected a list of mappings with a `name`"),
        ([], [{"name": "a", "engine": {}}], "members of a study share engine"),
        ([], [{"name": "a"}, {"name": "a"}], "two members are named a"),
        ([], [{"name": "../a"}], "becomes a directory"),
        ([], [{"name": "a", "optim": {"rate": 1}}], r"\(a\): optim.rate: unknown key"),
        (["data.global_batch=4,8"], None, "members of a study share data.global_batch"),
        (["optim.lr"], None, "expected key=value,value"),
        (["optim.lr="], None, "names no value"),
        (["optim.lr=fast,slow"], None, "optim.lr: expected a number"),
        (["optim.lr=1e-3", "optim.lr=3e-4"], None, "--vary optim.lr: is given twice"),
        (["optim.lr=1e-3,0.001"], None, "--vary optim.lr: names a value twice"),
        (["method.r=4", "method={name: adapter}"], None, "--vary method: would replace what --vary method.r sets"),
        (["seed.x=1"], None, "--vary seed.x: seed is 7 and has no keys"),
        ([], [{"name": "study.json"}], "study.json is the table of the study"),
    ],
)
def test_what_cannot_be_a_study_is_refused_in_one_line(load, vary, study, words):
    with pytest.raises(BadInput, match=words) as error:
        load(*vary, study=study)
    assert "\n" not in str(error.value)


def test_a_method_and_then_a_key_of_it_may_vary(load):
    study = load("method={name: lora},{name: adapter}", "method.r=4,8")
    assert [(m.method["name"], m.method["r"]) for m in study.members.values()] == [
        ("lora", 4),
        ("lora", 8),
        ("adapter", 4),
        ("adapter", 8),
    ]


@pytest.mark.parametrize("run_dir", [None, ["a"], 5])
def test_a_run_directory_that_is_no_text_is_refused(load, run_dir):
    with pytest.raises(BadInput, match="run_dir: expected a text"):
        load("seed=1,2", run_dir=run_dir)


def test_a_study_moves_with_its_members(load):
    study = load("seed=1,2")
    study.move(Path("runs/other"))
    assert [Path(m.run_dir) for m in study.members.values()] == [Path("runs/other/seed1"), Path("runs/other/seed2")]


def test_a_study_is_no_recipe_of_a_run(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(COMMON | {"study": [{"name": "a"}]}))
    with pytest.raises(BadInput, match=r"Start it with launchers/study.py"):
        recipes.load(tmp_path / "r.yaml")
