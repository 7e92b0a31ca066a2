"""Muon on two ranks of every ZeRO stage trains as torch's own Muon and AdamW in one plain process: with accumulation,
clipping, offload, a bfloat16 base, and matrices of one row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import launch
from tests.helpers.models import tiny_mllm
from tests.helpers.rank_scripts import mllm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.mllm"
CPU = {"device": "cpu", "pin_memory": False}
ZERO = {str(stage): {"stage": stage} for stage in (0, 1, 2, 3)}
ZERO["offload"] = {"stage": 3, "sub_group_size": 100, "offload_param": CPU, "offload_optimizer": CPU}
# DeepSpeed's own linear map at stage 3, which stays in the process, rounds to bfloat16 before it adds the bias.
ZERO["usual linear"] = {"stage": 3, "memory_efficient_linear": False}
# nodes are rows of vectors, attention and gate matrices of one row; the others maps
GRAPH = {"name": "graph_lora", "r": 2}
ONE_ROW = {"name": "routed_lora", "r": 1, "route": "mul", "train_norms": True}
CLIPPED = {"name": "muon", "weight_decay": 0.1, "clip": 0.05, "accumulation": 2}
CASES = [
    *(
        {"method": ONE_ROW, "condition": "pooled", "deepspeed": zero, "dtype": "bfloat16"}
        for zero in ("0", "2", "usual linear")
    ),
    *({"method": GRAPH, "deepspeed": zero} for zero in ("0", "1", "2", "3", "offload")),
    *({"method": ONE_ROW, "condition": "pooled", "deepspeed": zero} for zero in ("1", "3", "offload")),
]
CASES = [
    {
        **case,
        "name": f"{case['method']['name']} {case['deepspeed']} {case.get('dtype', 'float32')}",
        "family": "qwen2_vl",
        "optim": CLIPPED,
        "deepspeed": f"{case['deepspeed']}.json",
    }
    for case in CASES
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("muon")
    tiny_mllm.write(path / "qwen2_vl", "qwen2_vl")
    for name, zero in ZERO.items():
        (path / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    (path / "cases.json").write_text(json.dumps(CASES))
    result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path), ranks=2, timeout=500)
    assert result.code == 0, result.tail()
    return path


def largest(found: dict, other: dict) -> float:
    """Largest difference of trained weights."""
    assert found["weights"].keys() == other["weights"].keys()
    return max(float((found["weights"][name] - w).abs().max()) for name, w in other["weights"].items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_two_ranks_train_as_torchs_own_muon_in_one_process(folder, case):
    found, want = torch.load(folder / f"{case['name']}.pt", weights_only=False), mllm.plainly(folder, case)
    assert found["losses"][:2] == pytest.approx(want["losses"][:2], abs=1e-5)
    # torch orthogonalises in bfloat16: another order of additions may move a number to its neighbour there, and a base
    # in bfloat16 rounds what comes of that once more.
    assert found["losses"] == pytest.approx(want["losses"], abs=1e-2 if "dtype" in case else 1e-5)
    near = largest(found, want)
    assert near < 5e-3
    other = mllm.plainly(folder, {**case, "optim": CLIPPED | {"name": "adamw"}})
    assert largest(other, want) > 5 * near, "a negative control"


def test_clipping_shows(folder):
    """A negative control: without it, what AdamW steps beside Muon would be the same, and the momentum another one."""
    case = CASES[3]
    free, want = (mllm.plainly(folder, {**case, "optim": CLIPPED | {"clip": clip}}) for clip in (0.0, CLIPPED["clip"]))
    assert largest(free, want) > 1e-2
