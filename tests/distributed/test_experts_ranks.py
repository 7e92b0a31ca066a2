"""LoRA in fused experts: two ranks, whose texts meet different experts, train as one plain process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import launch
from tests.helpers.models import tiny_families
from tests.helpers.rank_scripts import mllm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.mllm"
# Weights that are no modules: (experts, in, out) in one order or the other.
EXPERTS = {
    "qwen3_vl_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "llama4": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
}
CASES = [
    {
        "name": f"{family}_zero{stage}",
        "family": family,
        "method": {"name": "lora", "r": 2, "target_parameters": EXPERTS[family]},
        "deepspeed": f"ds{stage}.json",
    }
    for family, stage in (("qwen3_vl_moe", 1), ("qwen3_vl_moe", 2), ("llama4", 2))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("experts_ranks")
    for family in EXPERTS:
        tiny_families.write(path / family, family)
    for stage in (1, 2):
        (path / f"ds{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (path / "cases.json").write_text(json.dumps(CASES))
    result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path), ranks=2, timeout=600)
    assert result.code == 0, result.tail()
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_ranks_train_the_experts_as_one_process_does(folder, case):
    found, want = torch.load(folder / f"{case['name']}.pt", weights_only=False), mllm.plainly(folder, case)
    assert found["losses"] == pytest.approx(want["losses"], abs=1e-5)
    assert found["weights"].keys() == want["weights"].keys() and all(".experts." in n for n in want["weights"])
    for name, weight in want["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=0, msg=name)
