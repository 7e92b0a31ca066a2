"""Seeds of a step: the numbers that `torch.manual_seed` would give."""

import pytest
import torch

from mmpeft_ds.engine.step import seed_generators, seed_of


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_draws_what_torch_manual_seed_gives(step):
    seed = seed_of(3, step, 1)
    torch.manual_seed(seed)
    expected, dropped = torch.rand(5), torch.dropout(torch.ones(64), 0.5, True)
    torch.manual_seed(0)
    assert not torch.equal(torch.rand(5), expected)
    seed_generators(seed, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected) and torch.equal(torch.dropout(torch.ones(64), 0.5, True), dropped)


def test_other_devices_are_seeded_by_torch(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    seed_generators(5, torch.device("cuda", 0))
    assert seeds == [5]
