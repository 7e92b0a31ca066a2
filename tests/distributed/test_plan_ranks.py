"""The bytes that a plan foresees are those that real ranks send, and hold.

Traffic: every collective of torch.distributed, whoever calls it. Memory: tensors that Python holds before a step, and
on top what torch's allocator hands out in it; resident memory of a process would be that of the interpreter and its
libraries, which are thousands of times larger than a tiny model.
"""

import json
from pathlib import Path
from unittest import mock

import pytest

from mmpeft_ds.planning import count, microbatch, others, planner
from mmpeft_ds.planning.cluster import cluster
from tests.helpers import launch
from tests.helpers.models import tiny_mllm
from tests.helpers.rank_scripts import planned

pytestmark = pytest.mark.distributed
# Sizes that make a tiny model gather, prefetch and release as a large one does under the usual ones.
SMALL = {
    "stage3_param_persistence_threshold": 500,
    "stage3_prefetch_bucket_size": 3000,
    "stage3_max_live_parameters": 20000,
    "stage3_max_reuse_distance": 5000,
}
WHOLE = {"stage3_param_persistence_threshold": 500}
COPIES = {"stage": 3, **SMALL, "zero_hpz_partition_size": 2}
QUICK = [
    {"name": "stage1", "zero": {"stage": 1}},
    {"name": "stage3", "zero": {"stage": 3, **SMALL}},
]
MORE = [
    {"name": "stage0", "zero": {"stage": 0}},
    {"name": "stage2", "zero": {"stage": 2}},
    {"name": "stage2_parts", "zero": {"stage": 2}, "accumulation": 2},
    {"name": "stage3_whole", "zero": {"stage": 3}},
    {"name": "stage3_ahead", "zero": {"stage": 3, **WHOLE}},
    {"name": "stage3_recomputed", "zero": {"stage": 3, **SMALL}, "recompute": True},
    {"name": "stage3_parts", "zero": {"stage": 3, **SMALL}, "accumulation": 2},
    {"name": "stage3_nothing_kept", "zero": {"stage": 3, **dict.fromkeys(SMALL, 0)}, "recompute": True},
    {"name": "stage3_packed", "zero": {"stage": 3, **SMALL}, "row": 150},
    {"name": "stage3_half", "zero": {"stage": 3, **SMALL}, "dtype": "bfloat16", "recompute": True},
]
KNN = {"name": "knn", "zero": {"stage": 1}, "head": {"r": 40, "graph": "knn", "k": 4, "tau": -1.0}}
HEADS = [
    {"name": "threshold", "zero": {"stage": 1}, "head": {"r": 40, "tau": 0.5}},
    KNN,
    {"name": "mean", "zero": {"stage": 0}, "head": {"r": 40, "tau": 0.5, "normalisation": "mean"}},
    {"name": "threshold2", "zero": {"stage": 2}, "head": {"r": 40, "tau": 0.5}},
    {"name": "threshold3", "zero": {"stage": 3, **WHOLE}, "head": {"r": 40, "tau": 0.5}},
    {"name": "knn3", "zero": {"stage": 3, **WHOLE}, "head": {"r": 40, "graph": "knn", "k": 4, "tau": -1.0}},
    {"name": "wide3", "zero": {"stage": 3, **WHOLE}, "head": {"r": 300, "graph": "knn", "k": 4, "tau": -1.0}},
    {"name": "knn3_small", "zero": {"stage": 3, **SMALL}, "head": {"r": 40, "graph": "knn", "k": 4, "tau": -1.0}},
]
HEGRAPH = [
    {"name": f"{shard}{stage}", "zero": zero, "hegraph": {"shard": shard}}
    for shard in ("none", "cache", "classes")
    for stage, zero in ((0, {"stage": 0}), (1, {"stage": 1}), (2, {"stage": 2}), (3, {"stage": 3, **SMALL}))
]
FOUR = [
    QUICK[0],
    MORE[1],
    QUICK[1],
    {"name": "copies", "zero": COPIES},
    {"name": "copies_recomputed", "zero": COPIES, "recompute": True},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Cases on so many ranks: folder with what was measured."""

    def _run(cases: list[dict], ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("planned")
        tiny_mllm.write(folder / "llava", "llava")
        (folder / "cases.json").write_text(json.dumps(cases))
        script = "tests.helpers.rank_scripts.planned"
        result = launch.run_forked(script, str(folder / "cases.json"), str(folder), ranks=ranks, timeout=400)
        assert result.code == 0, result.tail()
        return folder

    return _run


class Foreseen:
    """What a plan says of a case on so many ranks, two to a node where there are four."""

    def __init__(self, folder: Path, case: dict, ranks: int, stage: int | None = None):
        resolved = planned.resolved_of(folder, case)
        zero = case["zero"] if stage is None else {"stage": stage}
        self.planner = planner.Planner(resolved, microbatch.Filling(words=planned.WORDS))
        recompute = case.get("recompute", False)
        batch = microbatch.fill(resolved.backbone, resolved.train[0].task, planned.size(case), self.planner.filling)
        with mock.patch.object(others, "sure", lambda mask: True):  # ranks on a CPU can ask
            counted = count.count(resolved, batch, recompute, count.Others(ranks, neighbours=1e9))
        self.machines = cluster(max(1, ranks // 2), min(2, ranks), 80.0)
        self.choice = self.planner.choice("case", zero, self.machines, counted, recompute)

    @property
    def received(self) -> dict[str, dict[str, int]]:
        """Size of the group -> kind -> bytes."""
        found = {str(self.machines.ranks): self.choice.traffic.wide}
        return found | ({str(self.machines.gpus): self.choice.traffic.near} if self.choice.traffic.near else {})

    @property
    def calls(self) -> dict[str, int]:
        """Size of the group -> collectives."""
        found = {str(self.machines.ranks): self.choice.traffic.calls}
        return found | ({str(self.machines.gpus): self.choice.traffic.near_calls} if self.choice.traffic.near else {})

    @property
    def held(self) -> int:
        return sum(self.choice.parts.values())


def measured(folder: Path, case: dict) -> dict:
    return json.loads((folder / f"{case['name']}.json").read_text())


def assert_as_foreseen(folder: Path, case: dict, ranks: int) -> None:
    foreseen, found = Foreseen(folder, case, ranks), measured(folder, case)
    assert foreseen.received.keys() == found["received"].keys(), case["name"]
    for group, kinds in found["received"].items():
        for kind, size in kinds.items():
            # DeepSpeed sums a norm and a flag besides, a few bytes each.
            assert foreseen.received[group][kind] == pytest.approx(size, rel=0.05, abs=64), (case["name"], group, kind)
        assert sum(foreseen.received[group].values()) == pytest.approx(sum(kinds.values()), rel=0.05), case["name"]
    # The norm is one more call; where nothing is kept, two gathers of a few calls come together.
    assert foreseen.calls.keys() == found["calls"].keys(), case["name"]
    for group, calls in found["calls"].items():
        assert foreseen.calls[group] == pytest.approx(calls, abs=2), (case["name"], group)
    assert foreseen.held == pytest.approx(found["memory"], rel=0.1), case["name"]


def test_two_ranks_send_and_hold_what_the_plan_says_and_not_what_it_says_of_another_stage(run):
    folder = run([*QUICK, KNN], 2)
    for case in (*QUICK, KNN):
        assert_as_foreseen(folder, case, 2)
    for case, other in zip(QUICK, (3, 1), strict=True):  # negative control: a plan that ignores the stage
        wrong, found = Foreseen(folder, case, 2, other), measured(folder, case)
        total = sum(found["received"]["2"].values())
        assert sum(wrong.received["2"].values()) != pytest.approx(total, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_graph_over_all_ranks_sends_and_holds_what_the_plan_says(run, ranks):
    folder = run(HEADS, ranks)
    for case in HEADS:
        assert_as_foreseen(folder, case, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_hegraph_sends_and_holds_what_the_plan_says_whatever_is_shared_out(run, ranks):
    folder = run(HEGRAPH, ranks)
    for case in HEGRAPH:
        assert_as_foreseen(folder, case, ranks)
    none, cache = (Foreseen(folder, HEGRAPH[i], ranks) for i in (0, 4))  # negative control
    assert "reduce_scatter" in cache.received[str(ranks)] and "reduce_scatter" not in none.received[str(ranks)]


@pytest.mark.slow
def test_two_ranks_under_every_stage(run):
    folder = run(MORE, 2)
    for case in MORE:
        assert_as_foreseen(folder, case, 2)


@pytest.mark.slow
def test_four_ranks_in_two_groups(run):
    folder = run(FOUR, 4)
    for case in FOUR:
        assert_as_foreseen(folder, case, 4)
    # Negative control: without the copies all gathers would go over all ranks.
    plain = Foreseen(folder, {**FOUR[3], "zero": {"stage": 3, **SMALL}}, 4)
    assert plain.received["4"]["all_gather"] > 1.5 * measured(folder, FOUR[3])["received"]["4"]["all_gather"]
