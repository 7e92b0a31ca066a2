"""Two ranks over a quantised base train and evaluate as one plain process, at ZeRO stages 0, 1 and 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import launch, quantised
from tests.helpers.models import tiny_mllm
from tests.helpers.rank_scripts import mllm

pytestmark = [quantised.needs_packages, pytest.mark.distributed]
SCRIPT = "tests.helpers.rank_scripts.mllm"
CASES = [
    {
        "name": f"{form}_zero{stage}",
        "family": "qwen2_vl",
        "method": quantised.METHODS[method],
        "condition": "pooled",
        "quantise": form,
        "deepspeed": f"ds{stage}.json",
    }
    for form, stage, method in (
        ("nf4", 0, "lora"),
        ("nf4", 1, "lora"),
        ("nf4", 2, "routed_lora"),
        ("int8", 1, "lora"),
        ("fp8", 2, "lora"),
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantised_ranks")
    tiny_mllm.write(path / "qwen2_vl", "qwen2_vl")
    for stage in (0, 1, 2):
        (path / f"ds{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (path / "cases.json").write_text(json.dumps(CASES))
    result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path))
    assert result.code == 0, result.tail()
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_two_ranks_train_as_one_process(folder, case):
    found, want = torch.load(folder / f"{case['name']}.pt", weights_only=False), mllm.plainly(folder, case)
    assert found["losses"] == pytest.approx(want["losses"], abs=1e-5)
    assert found["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=0, msg=name)
    assert [r["prediction"] for r in found["rows"]] == [r["prediction"] for r in want["rows"]]
