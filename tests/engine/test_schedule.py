"""Learning-rate schedules."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mmpeft_ds.engine.optim.schedule import learning_rate, warmup_steps
from mmpeft_ds.recipe.options import OptimOptions


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


@pytest.mark.parametrize("steps_per_epoch", [1, 4])
def test_the_cosine_by_epochs_is_torchs_behind_one_epoch_of_warmup(steps_per_epoch):
    options = OptimOptions(lr=2e-3, schedule="cosine_epoch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)  # over all ten, though nine are left
    total = 10 * steps_per_epoch
    found = [learning_rate(options, s, total, steps_per_epoch) for s in range(total)]
    assert found[:steps_per_epoch] == [1e-5] * steps_per_epoch
    for epoch in range(1, 10):
        expected = pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        assert all(lr == expected for lr in found[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch])
        optimizer.step()
        cosine.step()
    assert found[-1] > 0  # the published curve stops two epochs short of zero


def test_an_epoch_cut_short_by_the_number_of_steps_is_one_and_beyond_the_end_the_floor_holds():
    options = OptimOptions(lr=1.0, schedule="cosine_epoch", warmup_lr=0.3, min_lr_ratio=0.1)
    assert [round(learning_rate(options, s, 5, 2), 6) for s in range(5)] == [0.3, 0.3, 1.0, 1.0, 0.775]
    assert learning_rate(options, 99, 5, 2) == pytest.approx(0.1)


def test_a_cosine_by_epochs_without_their_length_is_an_error():
    with pytest.raises(ValueError, match="steps per epoch"):
        learning_rate(OptimOptions(schedule="cosine_epoch"), 0, 10)
