"""A checkpoint of any rank count and ZeRO stage continues under any other; one launch per rank count runs all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.helpers import launch

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.checkpoint"
STAGES = ("stage0", "stage1", "stage2", "stage3")
OTHER_OPTIMIZERS = ("stage1-sgd", "stage3-sgd", "stage1-adam", "stage3-adam", "stage1-muon", "stage3-muon")
NAMES = [
    *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("down.weight", "up.weight", "up.bias")),
    "head.weight",
    "head.bias",
]


def run(folder: Path, mode: str, ranks: int) -> dict:
    result = launch.run_forked(SCRIPT, str(folder), mode, ranks=ranks)
    assert result.code == 0 and not result.killed, result.tail()
    name = mode if mode == "write" else f"read{ranks}"
    every = [json.loads((folder / f"{name}-{r}.json").read_text()) for r in range(ranks)]
    for other in every[1:]:  # all ranks must have come to the same result
        assert {k: v["after"] for k, v in other["read"].items()} == {
            k: v["after"] for k, v in every[0]["read"].items()
        }
    return every[0] | {"both": every}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def two(folder) -> dict:
    return run(folder, "write", 2)


@pytest.mark.parametrize("name", [*(s + b for s in STAGES for b in ("", "-bf16")), *OTHER_OPTIMIZERS])
def test_same_ranks_and_stage_continue_to_the_bit(two, name):
    found = two["read"].get(f"{name}->{name[5]}")
    assert found["after"] == two["written"][name]["after"]
    assert found["step"] == (0 if "sgd" in name else 7) and found["state"]["step"] == 4
    assert found["state"]["bad"] == {"image": 2} and found["state"]["best"] == 0.5


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_a_run_with_checkpoints_is_one_without_to_the_bit_and_torchs_on_one_process(two, name):
    case = two["written"][name]
    assert case["losses"] + case["after"] == case["never_saved"]
    assert case["never_saved"] == pytest.approx(two["plain"][name.partition("-")[2]], abs=1e-5)


def test_the_optimisers_differ(two):
    """Negative control: the comparison with torch would see one optimiser in place of another."""
    last = {name: losses[-1] for name, losses in two["plain"].items()}
    assert abs(last["sgd"] - last["adamw"]) > 1e-3 and abs(last["adam"] - last["adamw"]) > 1e-4
    assert abs(last["muon"] - last["adamw"]) > 1e-3


@pytest.mark.parametrize("source", ["stage3", "stage1", "stage3-sgd", "stage1-muon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_stage_continues_the_curve(two, source, stage):
    assert two["read"][f"{source}->{stage}"]["after"] == pytest.approx(two["written"][source]["after"], abs=1e-5)


def test_a_bf16_base_continues_under_another_stage_within_its_precision(two):
    found = two["read"]["stage3-bf16->1"]["after"]
    assert found == pytest.approx(two["written"]["stage3-bf16"]["after"], abs=1e-3)


@pytest.mark.slow  # test_resume_e2e.py changes the number of ranks through the launcher
@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_continues_the_curve(folder, two, ranks):
    found = run(folder, "read", ranks)["read"]
    assert len(found) == 14
    for name, case in found.items():
        assert case["after"] == pytest.approx(case["expected"], abs=1e-5), name
        assert case["fingerprint_equal"], name


def test_moments_and_step_matter_for_the_curve(two):
    """Negative control: the losses after the checkpoint are not those that fresh weights or no training give."""
    for case in two["written"].values():
        assert not math.isclose(case["after"][-1], case["losses"][-1], abs_tol=1e-4)


def test_the_fingerprint_is_the_same_for_every_stage(two):
    fingerprints = [two["written"][name]["fingerprint"] for name in STAGES]
    assert all(p == fingerprints[0] for p in fingerprints)
    assert sorted(fingerprints[0]) == sorted(
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("base.weight", "base.bias", "mean")
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_a_flipped_bit_in_a_frozen_weight_and_other_trainables_are_refused(two, stage):
    assert "frozen weight blocks.1.base.weight is" in two["refusals"][f"flip{stage}"]
    assert "trained parameter head.bias" in two["refusals"][f"names{stage}"]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_another_optimiser_is_refused(two, stage):
    assert "written with optim.name: sgd, and this run has adamw" in two["refusals"][f"optimizer{stage}"]


@pytest.mark.parametrize("name", STAGES)
def test_saving_moves_three_times_the_trained_bytes_at_most_and_nothing_frozen(two, name):
    case = two["written"][name]
    # weights and two moments; ZeRO-3 pads each of the 8 tensors to two equal parts; further: sums of bits, 8 bytes a
    # tensor three times and 16 bytes a moment, and the name of the directory
    assert case["bytes"] <= 3 * (case["trainable_bytes"] + 4 * 8) + 3 * 8 * 8 + 2 * 16 + 500


def test_the_byte_count_would_see_a_gathered_frozen_weight(two):
    """Negative control for the test above."""
    case = two["written"]["stage3"]
    assert case["bytes_of_everything"] > case["trainable_bytes"] + 2 * 4 * 49


@pytest.mark.parametrize("name", [*(s + b for s in STAGES for b in ("", "-bf16")), *OTHER_OPTIMIZERS])
def test_the_files_have_the_bytes_that_deepspeeds_own_calls_give(two, name):
    assert two["written"][name]["same_bytes"] == {"weights.safetensors": True, "optimizer.safetensors": True}


@pytest.mark.parametrize("name", STAGES)
def test_all_tensors_come_by_one_gather(two, name):
    first, second = (case["written"][name] for case in two["both"])
    gathers = 0 if name == "stage0" else 1
    assert first["calls"].get("gather", 0) == second["calls"].get("gather", 0) == gathers
    # Control: DeepSpeed's own calls, one for each of 8 parameters and 2 moments of each.
    assert sum(first["calls_of_deepspeed"].values()) == (0 if name == "stage0" else 24)


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_gathers_with_room_for_few_numbers_give_the_same_and_keep_to_their_room(two, name):
    for bucket, case in two["written"][name]["narrow"].items():
        assert case["equal"] and max(case["sizes"]) <= int(bucket) and len(case["sizes"]) > 10
        assert [list(names) for names in case["names"].values()] == 3 * [NAMES]


@pytest.mark.parametrize("name", [*(s + b for s in STAGES for b in ("", "-bf16")), *OTHER_OPTIMIZERS])
def test_large_parts_are_gathered_each_into_its_place(two, name):
    first, second = (case["written"][name]["alone"] for case in two["both"])
    assert len(first) >= len(NAMES) and all(first)
    assert second == [] or name.startswith("stage0")


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_rank_0_alone_copies_to_the_host(two, name):
    first, second = (case["written"][name]["narrow"] for case in two["both"])
    assert all(case["copies"] == len(case["sizes"]) for case in first.values())
    assert all(case["copies"] == 0 and not any(case["names"].values()) for case in second.values())
