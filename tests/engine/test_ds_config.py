"""DeepSpeed JSON files: the shipped ones are valid, and conflicts with the recipe are refused."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mmpeft_ds.engine.zero import config
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
    merged["zero_optimization"].pop("zero_hpz_partition_size", None)  # follows from the machines: test_node_groups.py
    assert "auto" not in json.dumps(merged)
    assert merged["train_batch_size"] == merged["train_micro_batch_size_per_gpu"] * 2 * 3
    assert merged["train_batch_size"] >= 50


@pytest.mark.parametrize(("trained", "size"), [(10, 1 << 16), (100_000, 100_000), (100_001, 100_002)])
def test_automatic_buffers_hold_the_gradients_of_one_backward_pass_and_not_more(trained, size):
    recipe = recipe_with(REPOSITORY / "ds_configs" / "zero1.json")
    zero = merge(check_ds_config(recipe), recipe, 2, trained)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == size


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
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "other parameters' numbers"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint: true is refused"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "rounded to 4 bits"),
        ({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 9}}, "granularity_threshold: 9 is"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "nothing would be clipped"),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 100_001}}, "100001 is odd"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "refused below stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "'nvme' is refused"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio: 0.5 is"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, "super_offload: true is"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "new_key": 1}}}, "new_key: 1 is"),
        ({"zero_optimization": {"stage": "3"}}, 'stage: "3" is no whole number'),
        ({"zero_optimization": {"stage": True}}, "stage: true is no whole number"),
        ({"prescale_gradients": True}, "prescale_gradients: true is refused"),
        ({"gradient_predivide_factor": 2}, "gradient_predivide_factor: 2 is refused"),
        ({"communication_data_type": "bf16"}, 'communication_data_type: "bf16" is refused'),
        ({"sparse_gradients": True}, "sparse_gradients: true is refused"),
        ({"gradient_clipping": 1.0}, "optim.clip"),
        (
            {
                "zero_optimization": {
                    "stage3_gather_fp16_weights_on_model_save": False,
                    "stage": 3,
                    "gather_16bit_weights_on_model_save": False,
                }
            },
            "deprecated parameter",
        ),
        ("{", "JSON"),
        ("[]", "list"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, config, said):
    with pytest.raises(BadInput, match=said) as caught:
        check_ds_config(written(tmp_path, config))
    assert "\n" not in str(caught.value)


def test_what_deepspeed_does_anyway_may_be_written_out(tmp_path):
    fields = {name: f.default for name, f in DeepSpeedZeroConfig.model_fields.items()}
    own = ("stage", "leaf_module", "stage3_gather_fp16_weights_on_model_save")  # the last one under its new name
    values = {name: value for name, value in fields.items() if value is not None and name not in own}
    given = {"zero_optimization": {"stage": 3, **values}, "prescale_gradients": False, "gradient_predivide_factor": 1}
    assert check_ds_config(written(tmp_path, given))["zero_optimization"]["round_robin_gradients"] is False


def test_a_new_key_of_deepspeed_is_refused_until_somebody_has_tried_it(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ZERO_KEYS", config.ZERO_KEYS - {"reduce_scatter"})
    given = written(tmp_path, {"zero_optimization": {"stage": 1, "reduce_scatter": False}})
    with pytest.raises(BadInput, match="reduce_scatter: false is refused: nobody has shown"):
        check_ds_config(given)


def test_clipping_is_always_said_to_deepspeed(tmp_path):
    recipe = written(tmp_path, {})
    for clip in (0.0, 0.7):
        recipe.optim.clip = clip
        assert merge(check_ds_config(recipe), recipe, 2, 10)["gradient_clipping"] == clip


def test_a_missing_file_is_refused():
    with pytest.raises(BadInput, match="nowhere.json"):
        check_ds_config(recipe_with("nowhere.json"))


@pytest.mark.parametrize(("stage", "enabled"), [(0, False), (1, False), (2, False), (3, True)])
def test_bf16_is_switched_on_in_deepspeed_at_stage_3_only(tmp_path, stage, enabled):
    recipe = written(tmp_path, {"zero_optimization": {"stage": stage}})
    recipe.engine.dtype = "bfloat16"
    assert merge(check_ds_config(recipe), recipe, 2, 10)["bf16"] == {"enabled": enabled}
