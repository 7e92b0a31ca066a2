"""Every type of peft on every backbone it is accepted on: 2 ranks at ZeRO 1, 2 and 3 train as one plain process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmpeft_ds.methods.peft.kinds import KINDS
from tests.helpers import launch, method_table, peft_table
from tests.helpers.runs import tiny_pairs

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.pairs"
STAGES = (1, 2, 3)
# Columns of the table of types -> tiny backbones of this test.
BACKBONES = {
    "vision_text_encoder": "vision_text_encoder",
    "vision_text_decoder": "vision_text_decoder",
    "dual_encoder": "dual_encoder",
    "clip_bart": "clip_bart",
    "clip": "clip",
    "blip captioner": "blip",
    "blip vqa": "blip_vqa",
    "mllm Qwen2-VL": "mllm",
}
# Their head or projection trains whole, which trainable_tokens cannot have beside it.
WHOLE_HEADS = ("vision_text_encoder", "dual_encoder")


def cases(stage: int) -> list[dict]:
    """The pairs that the table accepts at a stage."""
    cells = method_table.read(peft_table.PAGE.read_text("utf-8"))
    found = []
    for column, backbone in BACKBONES.items():
        for name, kind in KINDS.items():
            refused = stage == 3 and kind.stage3 or name == "trainable_tokens" and backbone in WHOLE_HEADS
            if cells[name, column] == "yes" and not refused:
                method = {"name": "peft", "type": name, "options": peft_table.SMALL.get(name, {})}
                found.append({"name": f"{name}-{backbone}", "backbone": backbone, "method": method, "stage": stage})
    return found


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> tuple[Path, dict]:
    """A folder with the tiny checkpoints, and the `backbone` section for each."""
    folder = tmp_path_factory.mktemp("backbones")
    with peft_table.small_towers():
        return folder, tiny_pairs.write_backbones(folder, set(BACKBONES.values()))


@pytest.fixture(scope="module")
def plain(backbones) -> dict[str, dict]:
    """What one process trains without DeepSpeed, for each pair."""
    folder, sections = backbones
    return {c["name"]: tiny_pairs.train_plainly(tiny_pairs.resolved(c, sections, folder)) for c in cases(0)}


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: f"ZeRO-{stage}")
def trained(request, backbones) -> tuple[int, Path]:
    folder, sections = backbones
    out = folder / f"stage{request.param}"
    out.mkdir()
    (out / "cases.json").write_text(json.dumps({"cases": cases(request.param), "backbones": sections}))
    result = launch.run_forked(SCRIPT, str(out / "cases.json"), str(out), ranks=2, timeout=900)
    assert result.code == 0, result.tail()
    return request.param, out


@pytest.mark.parametrize("backbone", BACKBONES.values())
def test_two_ranks_train_as_one_plain_process(trained, plain, backbone):
    stage, out = trained
    for case in cases(stage):
        if case["backbone"] == backbone:
            found = torch.load(out / f"{case['name']}.pt", weights_only=False)
            compare(found, plain[case["name"]], case["name"])


def compare(found: dict, expected: dict, name: str) -> None:
    """Raise AssertionError unless gradients are equal at first, and losses and gradients stay near each other.

    Gradients that are nothing but rounding become steps of Adam, and the factors of `lily` depend on which texts share
    a rank, so they part in time.
    """
    assert found["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-4), name
    assert found["norms"][1:3] == pytest.approx(expected["norms"][1:3], rel=1e-2), name
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3, abs=1e-3), name
    assert list(found["weights"]) == list(expected["weights"]), name
    assert any(not torch.equal(w, expected["start"][n]) for n, w in found["weights"].items()), name


def test_the_comparison_notices_a_gradient_of_one_rank_alone(plain):
    """Negative control: a mean over one of the two ranks, or one that is off by a per cent."""
    expected = plain["lora-mllm"]
    for factor in (2, 0.5, 1.01):
        with pytest.raises(AssertionError):
            compare(expected | {"norms": [x * factor for x in expected["norms"]]}, expected, "lora")
