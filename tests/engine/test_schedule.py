import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mmpeft_ds.engine.options import OptimOptions
from mmpeft_ds.engine.schedule import learning_rate, warmup_steps


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 5, 0.1])
def test_curves_are_those_of_transformers(name, warmup):
    options = OptimOptions(lr=2e-3, warmup=warmup, schedule=name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[name]
    theirs = make(optimizer, warmup_steps(options, 40), 40)
    for step in range(40):
        assert learning_rate(options, step, 40) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_decay_ends_at_the_floor_and_stays_there():
    options = OptimOptions(lr=1.0, warmup=0, min_lr_ratio=0.1)
    assert learning_rate(options, 10, 10) == pytest.approx(0.1)
    assert learning_rate(options, 99, 10) == pytest.approx(0.1)


def test_constant_stays_at_the_peak_after_warmup():
    options = OptimOptions(lr=1.0, warmup=2, schedule="constant", min_lr_ratio=0.1)
    assert [learning_rate(options, s, 5) for s in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_a_share_of_warmup_is_rounded_up():
    assert warmup_steps(OptimOptions(warmup=0.05), 603) == 31
    assert warmup_steps(OptimOptions(warmup=31), 603) == 31
