"""Keys that a ds_configs JSON may set leave gradients, weights, saves and resumed runs as they are; one launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmpeft_ds.engine.zero.config import ZERO_KEYS
from tests.helpers import launch
from tests.helpers.runs import tiny_classifier

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.ds_keys"
CPU = {"device": "cpu", "pin_memory": False}
SENT = {  # stages 1 and 2, the opposite of the defaults; buckets smaller than most tensors
    "contiguous_gradients": False,
    "overlap_comm": True,
    "reduce_scatter": False,
    "reduce_bucket_size": 600,
    "use_multi_rank_bucket_allreduce": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 600,
    "ignore_unused_parameters": False,
}
FETCHED = {
    "contiguous_gradients": False,
    "overlap_comm": True,
    "reduce_scatter": False,
    "reduce_bucket_size": 600,
    "sub_group_size": 100,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 100,
    "stage3_max_live_parameters": 200,
    "stage3_max_reuse_distance": 0,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "stage3_gather_16bit_weights_on_model_save": True,
    "memory_efficient_linear": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
}
NOT_CLIPPED = {"optim__clip": 0.0}
CASES = [
    {"name": "plain", "zero": {"stage": 0}},
    {"name": "sent1", "zero": {"stage": 1, **SENT}},
    {"name": "sent2", "zero": {"stage": 2, **SENT}},
    {"name": "fetched", "zero": {"stage": 3, **FETCHED}},
    {"name": "offloaded", "zero": {"stage": 3, "sub_group_size": 100, "offload_param": CPU, "offload_optimizer": CPU}},
    *({"name": f"not_clipped{s}", "zero": {"stage": s}, "recipe": NOT_CLIPPED} for s in (0, 1, 3)),
    {"name": "round_robin", "zero": {"stage": 1, "round_robin_gradients": True}, "looking": False},
    {"name": "round_robin_seen", "zero": {"stage": 2, "round_robin_gradients": True}},
    {"name": "hidden", "zero": {"stage": 1, "offload_optimizer": CPU}},
]
# Muon puts matrices together, wherever DeepSpeed has laid their parts.
MUON = {"optim__name": "muon"}
CASES += [{**case, "name": f"muon {case['name']}", "recipe": MUON} for case in CASES[:5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ds_keys")
    tiny_classifier.make_towers(path)
    cases = [{**case, "config": {"zero_optimization": case["zero"]}} for case in CASES]
    (path / "cases.json").write_text(json.dumps(cases))
    result = launch.run(SCRIPT, str(path / "cases.json"), str(path), ranks=2, timeout=500)
    assert result.code == 0, result.tail()
    return path


def outcome(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=False)


def assert_same(found: dict, expected: dict, apart: float = 1e-5) -> None:
    assert "error" not in found, found["error"]
    for part in ("rows", "after", "resumed"):
        for row, other in zip(found[part], expected[part], strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), "gradient norm"
    for part in ("weights", "last"):
        assert list(found[part]) == list(expected[part])
        for name, weight in expected[part].items():
            torch.testing.assert_close(found[part][name], weight, atol=apart, rtol=0, msg=name)
    for name, weight in found["weights"].items():
        assert torch.equal(found["exported"][name], weight), name
    for step, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert step == pytest.approx(other, rel=1e-3, abs=1e-4), "where EWC finds gradients"


@pytest.mark.parametrize("name", ["sent1", "sent2", "fetched", "offloaded"])
def test_keys_that_may_be_set_change_no_number(folder, name):
    assert_same(outcome(folder, name), outcome(folder, "plain"))


@pytest.mark.parametrize("name", ["sent1", "sent2", "fetched", "offloaded"])
def test_no_key_changes_what_muon_gives(folder, name):
    # torch orthogonalises in bfloat16: another order of additions may move a number to its neighbour there.
    assert_same(outcome(folder, f"muon {name}"), outcome(folder, "muon plain"), apart=1e-3)
    with pytest.raises(AssertionError):  # negative control
        assert_same(outcome(folder, "plain"), outcome(folder, "muon plain"), apart=1e-3)


def test_every_key_that_may_be_set_is_tried():
    # zero_hpz_partition_size is tried in test_pairs_ranks.py, which needs four ranks
    tried = {key.removeprefix("stage3_") for case in CASES[:5] for key in case["zero"]}
    assert tried | {"zero_hpz_partition_size"} == ZERO_KEYS


@pytest.mark.parametrize("stage", [1, 3])
def test_without_clipping_nothing_is_clipped_although_deepspeed_clips_at_1_where_nothing_is_said(folder, stage):
    plain, free = outcome(folder, "plain"), outcome(folder, "not_clipped0")
    assert max(row["grad_norm"] for row in free["rows"]) > 1, "or clipping would not show"
    assert_same(outcome(folder, f"not_clipped{stage}"), free)
    with pytest.raises(AssertionError):
        assert_same(free, plain)


def test_a_save_that_would_not_hold_what_trains_is_refused(folder):
    """Negative control: with the key that `check_ds_config` refuses, DeepSpeed hands out other parameters' numbers."""
    found = outcome(folder, "round_robin")
    assert "RuntimeError" in found["error"] and "places of trained parameters do not fit them" in found["error"]
    assert not list((folder / "round_robin" / "checkpoints").glob("step-*"))
    assert "a master of another parameter" in outcome(folder, "round_robin_seen")["error"]


def test_gradients_are_hidden_where_the_optimizer_alone_is_offloaded_below_stage_3(folder):
    assert {row["grad_norm"] for row in outcome(folder, "hidden")["rows"]} == {0.0}
