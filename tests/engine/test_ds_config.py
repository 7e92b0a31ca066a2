import json
from pathlib import Path

import pytest

from mmpeft_ds.engine.zero.config import check_ds_config, merge
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe import REPOSITORY, Recipe

SHIPPED = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def recipe_with(path: Path | str) -> Recipe:
    recipe = Recipe(run_dir="r", backbone={}, method={})
    recipe.engine.deepspeed = str(path)
    return recipe


def written(tmp_path: Path, config) -> Recipe:
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return recipe_with(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_json_is_accepted_and_consistent(path):
    recipe = recipe_with(path)
    recipe.data.global_batch, recipe.optim.accumulation = 50, 2
    merged = merge(check_ds_config(recipe), recipe, world_size=3, trainable=1000)
    assert "auto" not in json.dumps(merged)
    assert merged["train_batch_size"] == merged["train_micro_batch_size_per_gpu"] * 2 * 3
    assert merged["train_batch_size"] >= 50


def test_auto_for_a_key_of_the_recipe_is_fine(tmp_path):
    recipe = written(tmp_path, {"zero_optimization": {"stage": 1}, "train_batch_size": "auto", "bf16": "auto"})
    assert check_ds_config(recipe) == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_batch_size": 64}, "data.global_batch"),
        ({"bf16": {"enabled": True}}, "engine.dtype"),
        ({"optimizer": {"type": "AdamW"}}, "optim"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parametres": 1}}, "stage3_max_live_parametres"),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}}, "auto"),
        ({"zero_optimization": 3}, "zero_optimization"),
        ("{", "JSON"),
        ("[]", "list"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, config, said):
    with pytest.raises(BadInput, match=said) as caught:
        check_ds_config(written(tmp_path, config))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused():
    with pytest.raises(BadInput, match="nowhere.json"):
        check_ds_config(recipe_with("nowhere.json"))


@pytest.mark.parametrize(("stage", "enabled"), [(0, False), (1, False), (2, False), (3, True)])
def test_bf16_is_switched_on_in_deepspeed_at_stage_3_only(tmp_path, stage, enabled):
    recipe = written(tmp_path, {"zero_optimization": {"stage": stage}})
    recipe.engine.dtype = "bfloat16"
    assert merge(check_ds_config(recipe), recipe, 2, 10)["bf16"] == {"enabled": enabled}
