"""Factors that all layers share, under ZeRO-3 with every parameter in parts: two ranks train as one plain process."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers import launch
from tests.helpers.rank_scripts import aurora

# Slow: the common case is among the pairs of test_pairs_ranks.py.
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.aurora"
CASES = [
    {"name": "plain", "leaves": False, "recompute": False},
    {"name": "leaves", "leaves": True, "recompute": False},
    {"name": "leaves_recompute", "leaves": True, "recompute": True},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aurora")
    (folder / "cases.json").write_text(json.dumps(CASES))
    done = launch.run_forked(SCRIPT, str(folder / "cases.json"), str(folder))
    assert done.code == 0 and not done.killed, done.tail()
    return {case["name"]: torch.load(folder / f"{case['name']}.pt") for case in CASES}


@pytest.fixture(scope="module")
def alone():
    """The same steps in one process: the mean of both halves, since states of a half do not see the other."""
    wrapped = aurora.adapted()
    step, own = aurora.Step(wrapped), aurora.trainables(wrapped)
    with torch.no_grad():
        before = wrapped.get_base_model().vision_model(aurora.batch(0)[0]).last_hidden_state
    optimizer = torch.optim.AdamW(own.values(), **aurora.ADAM)
    start = {n: p.detach().clone() for n, p in own.items()}
    for i in range(aurora.STEPS):
        pixels, ids = aurora.batch(i)
        optimizer.zero_grad()
        (sum(step(p, t) for p, t in zip(pixels.chunk(2), ids.chunk(2), strict=True)) / 2).backward()
        optimizer.step()
    moved = [(p - start[n]).abs().max() > 1e-5 for n, p in own.items()]
    assert all(moved), "the control: every trained tensor moves far more than is tolerated"
    return {"before": before, "weights": {n: p.detach() for n, p in own.items()}}


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_two_ranks_train_the_shared_factors_as_one_process(results, alone, name):
    torch.testing.assert_close(results[name]["before"], alone["before"], rtol=1e-5, atol=1e-6)
    assert set(results[name]["weights"]) == set(alone["weights"])
    for key, weight in alone["weights"].items():
        torch.testing.assert_close(results[name]["weights"][key], weight, rtol=0, atol=1e-6, msg=key)
