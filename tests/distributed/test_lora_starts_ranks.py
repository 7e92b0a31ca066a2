"""LoRA that starts from the frozen weights, or trains single tokens, over ranks and ZeRO stages; one launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmpeft_ds import adapter, merging
from tests.helpers import launch
from tests.helpers.runs import tiny_classifier

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.lora_starts"
ZERO0, ZERO1, ZERO3 = ({"zero_optimization": {"stage": stage}} for stage in (0, 1, 3))


def lora(**options) -> dict:
    return {"method": {"name": "lora", "r": 3, **options}}


NITER = lora(init_lora_weights="pissa_niter_1")
TOKENS = lora(trainable_token_indices={"word_embeddings": [5, 8]})
CASES = [
    # continued elsewhere: another stage, and another seed, with which another start is drawn
    {"name": "niter", "config": ZERO3, "recipe": NITER, "then": {"config": ZERO0, "recipe": {**NITER, "seed": 5}}},
    {"name": "olora", "config": ZERO1, "recipe": lora(init_lora_weights="olora"), "then": {"config": ZERO3}},
    {
        "name": "half",
        "config": ZERO3,
        "recipe": {**lora(init_lora_weights="pissa"), "engine__dtype": "bfloat16"},
        "then": {},
    },
    {"name": "tokens", "config": ZERO1, "recipe": TOKENS, "then": {"config": ZERO0}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lora_starts")
    tiny_classifier.make_towers(path)
    (path / "cases.json").write_text(json.dumps(CASES))
    result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path), ranks=2)
    assert result.code == 0, result.tail()
    return path


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_the_exported_adapter_is_the_trained_model_and_a_resumed_run_the_one_that_went_on(folder, name):
    run = torch.load(folder / f"{name}.pt", weights_only=False)
    loaded = adapter.load(folder / name / "adapter")
    got = merging.outputs(loaded.model, loaded.backbone, merging.probe(loaded.backbone))[0]
    tolerance = 2e-2 if name == "half" else 1e-5
    torch.testing.assert_close(got, run["trained"][0], rtol=0, atol=tolerance)
    assert (run["trained"][0] - run["first"][0]).abs().max() > 5 * tolerance  # negative control
    for row, other in zip(run["resumed"], run["after"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=tolerance / 10)
    if name == "niter":  # negative control: attached again, it would have been another start
        assert run["moved"] > 1e-3
