"""Micro-batches that are gathered ahead: which steps, and when each is made alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from mmpeft_ds.data import feature_ahead
from mmpeft_ds.data.feature_ahead import Lookahead

SLOTS, STEPS = (0, 1), 20


class Gather:
    """In the place of `FeatureBatches`: a batch is its step. Steps from `unusual` on have something unusual."""

    def __init__(self, unusual=STEPS):
        self.asked, self.unusual = [], unusual

    def ahead(self, epoch, shards, samples, size):
        steps = (shards[::size] - 100 * epoch).tolist()
        self.asked.append(steps)
        return None if steps[-1] >= self.unusual else SimpleNamespace(hashes=steps)

    def batch(self, ahead, number):
        return ahead.hashes[number]


def full(epoch):
    def places(steps):
        inside = steps[steps < STEPS]
        return np.repeat(100 * epoch + inside, 2).reshape(-1, 2), np.zeros((len(inside), 2), np.int64)

    return places


@pytest.fixture(autouse=True)
def _four_at_a_time(monkeypatch):
    monkeypatch.setattr(feature_ahead, "SAMPLES", 8)


@pytest.mark.parametrize("distance", [1, 3])
def test_all_but_the_first_of_an_epoch_are_gathered_ahead_by_the_distance_of_the_steps(distance):
    gather = Gather()
    lookahead = Lookahead(gather)
    for epoch in (0, 1):
        steps = list(range(1, STEPS, distance))
        assert [lookahead.take(epoch, SLOTS, step, full(epoch)) for step in steps] == [None, *steps[1:]]
        assert [step for steps in gather.asked for step in steps] == steps[1:]
        assert max(map(len, gather.asked)) == 4
        gather.asked.clear()


def test_after_a_step_that_nobody_expected_the_coming_ones_are_looked_for_anew():
    lookahead = Lookahead(Gather())
    steps = [0, 1, 2, 7, 8, 9, 3, 4]
    assert [lookahead.take(0, SLOTS, step, full(0)) for step in steps] == [None, 1, 2, 7, 8, 9, None, 4]
    assert lookahead.take(0, (4, 5), 5, full(0)) is None  # other slots


def test_at_changing_distances_little_is_gathered_in_vain_and_at_a_constant_one_much_again(monkeypatch):
    monkeypatch.setattr(feature_ahead, "SAMPLES", 32)
    monkeypatch.setattr(f"{__name__}.STEPS", 100)
    gather = Gather(unusual=100)
    lookahead = Lookahead(gather)
    changing = [0, 1, 3, 4, 6, 7, 9, 10, 12]
    assert [lookahead.take(0, SLOTS, step, full(0)) for step in changing] == [None, *changing[1:]]
    assert [len(steps) for steps in gather.asked] == [16, *[2] * 7]
    assert [lookahead.take(0, SLOTS, step, full(0)) for step in range(13, 50)] == list(range(13, 50))
    assert [len(steps) for steps in gather.asked[8:]] == [2, 4, 8, 16, 16]


def test_after_something_unusual_each_is_made_alone_for_as_many_steps_as_were_looked_at():
    gather = Gather(unusual=6)
    lookahead = Lookahead(gather)
    taken = [lookahead.take(0, SLOTS, step, full(0)) for step in range(12)]
    assert taken == [None, 1, 2, 3, 4, *[None] * 7]
    assert gather.asked == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
