"""GA-Net under DeepSpeed: two ranks at ZeRO-0, 1 and 3 have the gradients of one process with all rows, a rank without
samples or without edges does not hang, and everything that should train does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import launch
from tests.helpers.rank_scripts import ga_net as worker
from tests.helpers.references import ga_net as oracle

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
HEAD = "base_model.model.features.ga_net_head.default."
FIX = {"tau": 0.2}
STEPS = 4
CASES = [
    {"name": "stage 0", "stage": 0, "rows": "even"},
    {"name": "stage 1", "stage": 1, "rows": "uneven"},
    {"name": "stage 3 in parts", "stage": 3, "persistence": 0, "rows": "even"},
    {"name": "stage 3 resident", "stage": 3, "persistence": 1000000, "rows": "uneven"},
    {"name": "a rank without samples", "stage": 3, "persistence": 0, "rows": "one"},
    {"name": "a rank without samples, stage 1", "stage": 1, "rows": "one"},
    {"name": "no edges", "stage": 3, "persistence": 0, "rows": "uneven", "options": {"tau": 1.0}},
    # stored features stay float32, and with them all that trains
    {"name": "base in bfloat16", "stage": 3, "persistence": 0, "rows": "even", "dtype": "bfloat16"},
    {"name": "released v2", "stage": 3, "persistence": 0, "rows": "even", "options": {"variant": "v2", "tau": 0.2}},
    {"name": "released v2, stage 1", "stage": 1, "rows": "even", "options": {"variant": "v2", "tau": 0.2}},
]  # fmt: skip
CASES = [{"options": FIX, "steps": STEPS, **case} for case in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ga_net")
    (path / "cases.json").write_text(json.dumps(CASES))
    with launch.Launch(worker.__name__, str(path / "cases.json"), str(path), ranks=2) as launched:
        patience = 240.0  # two ranks that import everything on a busy machine
        for case in CASES:
            done = launched.wait_for(f"case done: {case['name']}.", patience)
            assert done, f"{case['name']}: failed, or hung for {patience} s:\n{launched.output[-6000:]}"
            patience = 60.0
        result = launched.wait(60.0)
    assert result.code == 0 and not result.killed, result.tail()
    return path


def found(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=False)


def expected(weights: dict[str, torch.Tensor], step: int, tau: float) -> dict[str, torch.Tensor]:
    """Loss and gradients of one process with all rows, in float64 by dense matrices."""
    x, labels = worker.rows_of(step)
    x = x.double()
    halves = [torch.nn.functional.normalize(h, dim=1) for h in x.split(worker.WIDTH, 1)]
    a_hat = oracle.hat(oracle.adjacency(torch.cat(halves, 1), "threshold", tau, 0))
    plain = {n.removeprefix(HEAD): w.double() for n, w in weights.items()}
    return oracle.gradients(plain, x, labels, a_hat, relu=True)


FIXED = [case for case in CASES if "variant" not in case["options"]]


@pytest.mark.parametrize("case", FIXED, ids=lambda c: c["name"])
def test_ranks_have_the_gradients_of_one_process(folder, case):
    got = found(folder, case["name"])
    want = expected(got["start"], 0, case["options"]["tau"])
    for name, gradient in got["gradients"].items():
        reference = want[name.removeprefix(HEAD)]
        assert (gradient - reference).abs().max() <= 1e-5 * reference.abs().max(), name
    assert got["losses"][0] == pytest.approx(float(want["loss"]), rel=1e-5)


@pytest.mark.parametrize("case", FIXED, ids=lambda c: c["name"])
def test_some_steps_of_adam_train_alike_at_every_stage(folder, case):
    got = found(folder, case["name"])
    assert not any(got["skipped"])
    weights = {n: w.double().clone().requires_grad_() for n, w in got["start"].items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=worker.LR, weight_decay=0.0)
    for step, loss in enumerate(got["losses"]):
        want = expected({n: w.detach() for n, w in weights.items()}, step, case["options"]["tau"])
        assert loss == pytest.approx(float(want["loss"]), rel=1e-4), step
        for name, w in weights.items():
            w.grad = want[name.removeprefix(HEAD)]
        optimizer.step()


@pytest.mark.parametrize("case", FIXED, ids=lambda c: c["name"])
def test_all_of_the_method_trains(folder, case):
    got = found(folder, case["name"])
    parts = {n.removeprefix(HEAD).split(".")[0] for n in got["start"]}
    assert parts == {"down", "conv", "up", "classifier"}
    still = [n for n in got["start"] if torch.equal(got["start"][n], got["end"][n])]
    assert not still


@pytest.mark.parametrize("name", ["released v2", "released v2, stage 1"])
def test_the_release_trains_its_classifier_alone(folder, name):
    got = found(folder, name)
    moved = {n.removeprefix(HEAD) for n in got["start"] if not torch.equal(got["start"][n], got["end"][n])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert {"down.weight", "conv.bias", "up.weight"} <= set(got["buffers"])
    assert not any(got["skipped"])
