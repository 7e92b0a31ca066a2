"""Two ranks under ZeRO-3, one of them without images, train and evaluate a multimodal model as one plain process, also
with their texts in one row."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from tests.helpers import launch
from tests.helpers.models import family_samples, tiny_families, tiny_mllm
from tests.helpers.rank_scripts import mllm

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.mllm"
# both towers, so that the rank without images has gradients to reduce for one it did not need
BOTH = {"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj", "qkv"]}
ROUTED = {"name": "routed_lora", "r": 2, "route": "mul", "train_norms": True}
CASES = [
    {"name": "llava_next_both", "family": "llava_next", "method": BOTH},
    {"name": "qwen2_vl_both", "family": "qwen2_vl", "method": BOTH},
    {
        "name": "qwen2_5_vl_recompute",
        "family": "qwen2_5_vl",
        "method": ROUTED,
        "condition": "pooled",
        "gradient_checkpointing": True,
    },
]
FAMILIES = ["llava", *tiny_families.FAMILIES]
TEXT = {"name": "lora", "r": 2, "target_modules": r".*(language_model|text_model).*\.(q_proj|v_proj)"}
LOW_RANK = TEXT | {"target_modules": family_samples.LOW_RANK}
OF_EACH = [
    {"name": name, "family": name, "method": LOW_RANK if name in family_samples.WITHOUT_SITES else TEXT}
    for name in FAMILIES
]
PACKED = [case | {"name": f"{case['name']}_packed", "packed": True, "steps": 2} for case in OF_EACH]
# Positions in three axes; images that are seen from both sides; layers that carry a state.
QUICK = [f"{family}_packed" for family in ("qwen3_vl", "gemma3", "qwen3_5")]


# Four steps of one process in float32 are 2e-5 (losses) and 6e-4 (weights) from float64, in which all is the same to
# the bit whether the cap of its logits is computed part by part or at once.
ROUNDED = ("gemma4_unified",)
EACH = 6  # cases of a launch, so that some can be chosen
SLOW = CASES + OF_EACH + [case for case in PACKED if case["name"] not in QUICK]
LAUNCHES = [SLOW[i : i + EACH] for i in range(0, len(SLOW), EACH)]
LAUNCHES.append([case for case in PACKED if case["name"] in QUICK])


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Folder of what ranks found in a launch of that number, which runs once."""

    @functools.cache
    def _launched(number: int) -> Path:
        path, cases = tmp_path_factory.mktemp("mllm_ranks"), LAUNCHES[number]
        for family in {case["family"] for case in cases}:
            (tiny_mllm if family in tiny_mllm.FAMILIES else tiny_families).write(path / family, family)
        # nothing resident: also the parameter that LLaVA-NeXT reads outside a forward has to be gathered
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
        (path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
        (path / "cases.json").write_text(json.dumps(cases))
        result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path), ranks=2, timeout=600)
        assert result.code == 0, result.tail()
        return path

    return _launched


@pytest.mark.parametrize(
    ("number", "case"),
    [
        pytest.param(n, case, id=case["name"], marks=[] if case["name"] in QUICK else pytest.mark.slow)
        for n, cases in enumerate(LAUNCHES)
        for case in cases
    ],
)
def test_a_rank_without_images_neither_hangs_nor_changes_the_result(launched, number, case):
    folder = launched(number)
    found, want = torch.load(folder / f"{case['name']}.pt", weights_only=False), mllm.plainly(folder, case)
    assert found["partitioned"]
    rounded = case["family"] in ROUNDED
    assert found["losses"] == pytest.approx(want["losses"], abs=5e-5 if rounded else 1e-5)
    assert found["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        differ = (found["weights"][name] - weight).abs()
        # Adam makes steps of rounding where a gradient is nearly nothing, and a row rounds otherwise than its texts.
        most = (1e-3, 0.005) if case.get("packed") else (2e-3 if rounded else 1e-5, 1.0)
        assert differ.max() <= most[0] and (differ > 1e-5).float().mean() <= most[1], name
    assert [r["prediction"] for r in found["rows"]] == [r["prediction"] for r in want["rows"]]
    assert [r["nll"] for r in found["rows"]] == pytest.approx([r["nll"] for r in want["rows"]], abs=1e-3)
