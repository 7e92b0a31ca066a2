"""N ranks under any ZeRO stage train as one plain process does; one launch runs all cases."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import launch
from tests.helpers.runs import tiny_classifier

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.train"
STEPS = 10
CASES = [
    *({"name": f"zero{s}", "stage": s} for s in (0, 1, 2, 3)),
    *({"name": f"zero{s}_accumulation", "stage": s, "accumulation": 2} for s in (0, 1, 2, 3)),
    *({"name": f"zero{s}_skew", "stage": s, "split": "skew"} for s in (1, 2, 3)),
    *({"name": f"zero{s}_one_rank_empty", "stage": s, "split": "one"} for s in (0, 3)),
    *({"name": f"zero{s}_poison", "stage": s, "poison": ["t/4-0"]} for s in (0, 1, 2, 3)),
    {"name": "zero3_poison_accumulation", "stage": 3, "accumulation": 2, "poison": ["t/4-0"]},
    {"name": "zero3_evaluate", "stage": 3, "split": "skew", "steps": 2, "evaluate": True},
    {"name": "zero1_evaluate", "stage": 1, "steps": 2, "evaluate": True},
    {"name": "zero3_recompute", "stage": 3, "gradient_checkpointing": True},
    *({"name": f"zero{s}_bf16", "stage": s, "dtype": "bfloat16"} for s in (0, 1, 2, 3)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("train_ranks")
    tiny_classifier.make_towers(path)
    (path / "cases.json").write_text(json.dumps(CASES))
    result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path), ranks=2)
    assert result.code == 0, result.tail()
    return path


@pytest.fixture(scope="module")
def plain(folder) -> dict:
    return train_plainly(folder)


def outcome(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=False)


def train_plainly(folder: Path, skip: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> dict:
    """The same 10 steps by one process in PyTorch, without DeepSpeed and without our engine's step; all numbers in
    `dtype`, from weights that float32 drew."""
    from mmpeft_ds.engine.assembly.resolve import attach

    recipe, task = tiny_classifier.make_recipe(folder), tiny_classifier.TinyTask()
    resolved = tiny_classifier.make_resolved(recipe, task)
    torch.manual_seed(recipe.seed)
    base = resolved.backbone.build()
    torch.manual_seed(recipe.seed)
    model = attach(resolved, base).eval().to(dtype)
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trainables.values() if p.dim() > 1]
    vectors = [p for p in trainables.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr=0.02
    )
    losses, norms, done = [], [], 0
    for step in range(STEPS):
        batch = tiny_classifier.pack_slots(
            tiny_classifier.global_slots(step, resolved.backbone), resolved.backbone, task
        )
        inputs = resolved.backbone.inputs(batch)
        inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        loss = task.loss(model(**inputs), batch) / task.weight(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainables.values(), 0.5).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - done / STEPS)
        if step not in skip:
            optimizer.step()
            done += 1
    return {"losses": losses, "norms": norms, "weights": {n: p.detach() for n, p in trainables.items()}}


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5, but: tuple[int, ...] = ()) -> None:
    for step, row in enumerate(found["rows"]):
        if step not in but:
            assert row["loss"] == pytest.approx(expected["losses"][step], abs=tolerance), f"loss of step {step}"
            assert row["grad_norm"] == pytest.approx(expected["norms"][step], rel=10 * tolerance), (
                f"norm of step {step}"
            )
    assert list(found["weights"]) == list(expected["weights"])
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_one_plain_process(folder, plain, stage):
    assert_same(outcome(folder, f"zero{stage}"), plain)


def test_the_comparison_notices_a_wrong_mean(folder, plain):
    """Negative control: a gradient that is off by a per mille is found."""
    wrong = copy.deepcopy(plain)
    wrong["losses"][3] *= 1.001
    with pytest.raises(AssertionError):
        assert_same(outcome(folder, "zero1"), wrong)


def test_losses_of_every_stage_are_as_near_to_float64_as_float32_gets(folder, plain):
    exact = train_plainly(folder, dtype=torch.float64)["losses"]

    def apart(losses: list[float]) -> float:
        return float(np.abs(np.subtract(losses, exact)).max())  # NaN where one is

    found = {
        n: apart([row["loss"] for row in outcome(folder, n)["rows"]]) for n in ("zero0", "zero1", "zero2", "zero3")
    }
    assert all(worst < 1e-5 for worst in found.values()) and 0 < apart(plain["losses"]) < 1e-5, found
    # Control: gradients or weights of half precision would show.
    assert apart([row["loss"] for row in outcome(folder, "zero3_bf16")["rows"]]) > 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_micro_steps_train_as_one(folder, plain, stage):
    assert_same(outcome(folder, f"zero{stage}_accumulation"), plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_images_on_one_rank_only_neither_hang_nor_change_the_result(folder, plain, stage):
    assert_same(outcome(folder, f"zero{stage}_skew"), plain)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_without_any_sample_changes_nothing(folder, plain, stage):
    assert_same(outcome(folder, f"zero{stage}_one_rank_empty"), plain)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_a_step_with_a_nan_is_skipped_by_all_and_leaves_no_trace(folder, name):
    found = outcome(folder, f"{name}_poison")
    assert [row["skipped"] for row in found["rows"]] == [step == 4 for step in range(STEPS)]
    assert math.isnan(found["rows"][4]["loss"])
    assert found["state"]["skipped_total"] == 1 and found["state"]["skipped_in_a_row"] == 0
    assert_same(found, train_plainly(folder, skip=(4,)), but=(4,))


def test_a_nan_in_the_first_micro_step_skips_the_whole_step(folder):
    found = outcome(folder, "zero3_poison_accumulation")
    assert found["rows"][4]["skipped"]
    assert_same(found, train_plainly(folder, skip=(4,)), but=(4,))


def test_recomputed_blocks_train_the_same(folder, plain):
    assert_same(outcome(folder, "zero3_recompute"), plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_base_keeps_float32_adapters_and_learns_alike(folder, plain, stage):
    found = outcome(folder, f"zero{stage}_bf16")
    assert "torch.bfloat16" in found["frozen_dtypes"]
    assert {w.dtype for w in found["weights"].values()} == {torch.float32}
    # bf16 keeps 8 bits: the losses of the first steps agree to a few percent and the run goes on alike.
    assert found["rows"][0]["loss"] == pytest.approx(plain["losses"][0], rel=0.05)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_over_a_bf16_base_gradients_are_added_up_in_float32_at_every_stage(folder, stage):
    """DeepSpeed would do so in bfloat16 at stage 3, which moves weights by 1e-2 within these ten steps."""
    found, other = outcome(folder, f"zero{stage}_bf16"), outcome(folder, "zero1_bf16")
    for row, expected in zip(found["rows"], other["rows"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, weight in other["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-4, rtol=0, msg=name)


def test_rows_tell_what_entered_the_loss(folder):
    found = outcome(folder, "zero3")
    hashes = [row["sample_keys_hash"] for row in found["rows"]]
    assert hashes == [row["sample_keys_hash"] for row in outcome(folder, "zero1_accumulation")["rows"]]
    assert len(set(hashes)) == STEPS
    assert found["bad"] == {"image": STEPS}
    assert len(found["rows"][0]["rss_mib"]) == 2
    total = sum(value**2 for value in found["rows"][0]["grad_norms"].values())
    assert math.sqrt(total) == pytest.approx(found["rows"][0]["grad_norm"])


@pytest.mark.parametrize("name", ["zero1_evaluate", "zero3_evaluate"])
def test_evaluation_sees_every_sample_once_in_one_order_whatever_the_split(folder, name):
    found = outcome(folder, name)["evaluation"]
    resolved = tiny_classifier.make_resolved(tiny_classifier.make_recipe(folder), tiny_classifier.TinyTask())
    slots = [
        slot for step in (20, 21) for slot in tiny_classifier.global_slots(step, resolved.backbone) if slot.weight > 0
    ]
    expected = sorted((s.sample_id, text) for s in slots for text in s.texts)
    assert sorted((r["sample_id"], r["text"]) for r in found["rows"]) == expected
    assert [r["sample_id"] for r in found["rows"]] == sorted(r["sample_id"] for r in found["rows"])
    assert [r["prediction"] for r in found["rows"]] == [
        r["prediction"] for r in outcome(folder, "zero1_evaluate")["evaluation"]["rows"]
    ]
    accuracy = sum(r["prediction"] == r["answer"] for r in found["rows"]) / len(found["rows"])
    assert found["scores"]["accuracy"] == pytest.approx(accuracy)
    assert found["scores"]["loss"] == pytest.approx(outcome(folder, "zero1_evaluate")["evaluation"]["scores"]["loss"])
    assert 0 < len(found["pictures"]) <= 3
