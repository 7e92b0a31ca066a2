"""The memory table of docs/memory.md is what the plan of the shipped recipes says."""

import pytest

from tests.helpers import memory_table

QUICK = ["captioning_own", "clip_bart_multitask_adapter", "routed_lora_vqav2_roberta"]


def test_some_rows_of_the_page_are_what_the_plan_says(tmp_path):
    lines = memory_table.table(tmp_path, QUICK)
    assert set(lines) <= set(memory_table.written())


@pytest.mark.slow
def test_all_rows_of_the_page_are_what_the_plan_says(tmp_path):
    assert memory_table.table(tmp_path) == memory_table.written()


def test_every_recipe_with_a_tower_has_a_row():
    small = {
        "classification_own",
        "quickstart",
        "retrieval_own",
        "retrieval_openclipart",
        "align_emoji",
        "few_shot_emoji",
        "ga_net_pets",
        "ga_net_flowers",
        "hegraph_coop",
        "mmrl_coop",
    }
    shipped = {p.stem for p in (memory_table.ROOT / "recipes").glob("*.yaml")}
    assert shipped - small == set(memory_table.MODELS)
