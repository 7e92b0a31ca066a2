"""Every recipe that is shipped can be read, and says how to run it."""

import pytest
import yaml

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.assembly import checks
from mmpeft_ds.engine.zero.config import check_ds_config
from tests.helpers import ROOT

# Studies of many runs have a form of their own, see tests/engine/test_few_shot_study.py.
SHIPPED = sorted(p for p in (ROOT / "recipes").glob("*.yaml") if not p.stem.startswith("few_shot_"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_recipe_is_valid_as_far_as_that_goes_without_its_data(path):
    recipe = recipes.load(path)
    checks.check_values(recipe)
    full = recipes.filled(recipe)
    stage = 3
    if full.backbone.get("form") == "retrieval":  # a momentum teacher needs whole parameters
        stage = 2
    if full.method["name"] == "linear_probe":  # solved without a step, on a small tower
        stage = 1
    assert check_ds_config(recipe)["zero_optimization"]["stage"] == stage
    for key, value in yaml.safe_load(path.read_text())["backbone"].items():
        assert full.backbone[key] == value
    assert recipe.data.validation, "the best checkpoint is chosen on something"
    assert not any(s.split == "test" for s in (*recipe.data.sources, *recipe.data.validation))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_header_of_a_shipped_recipe_holds_the_command_that_runs_it(path):
    header = path.read_text().split("\nrun_dir")[0]
    assert f"launchers/train.py --recipe recipes/{path.name}" in header


def test_there_are_recipes():
    assert "quickstart" in {p.stem for p in SHIPPED}
