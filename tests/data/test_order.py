"""Order of the stream, with ranks as plain objects."""

from collections import Counter

import numpy as np
import pytest

from mmpeft_ds.data.order import EpochOrder, Mix, Permutation, micro_slots, position_of, positions_of, steps_of


def walk(sizes, slots, world_size, accumulation=1, start=0, key=3, last_batch="pad", block=10, shuffle=True):
    """Step -> set of (slot, shard, sample) over all ranks, from step `start` on, as ranks would visit them."""
    order = EpochOrder(sizes, key, block, shuffle)
    n = len(order)
    ranks = [micro_slots(slots, r, world_size, accumulation) for r in range(world_size)]
    found = {}
    for step in range(start, steps_of(n, slots, last_batch)):
        mine = [slot for rank in ranks for micro in rank for slot in micro if slot is not None]
        places = [(slot, position_of(n, slots, slot, step)) for slot in mine]
        found[step] = sorted((slot, *order[p]) for slot, p in places if p is not None)
    return found


def everything(sizes):
    return {(shard, sample) for shard, n in enumerate(sizes) for sample in range(n)}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permutation_is_a_bijection(n):
    permutation = Permutation(n, key=n)
    assert sorted(permutation[i] for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 17])
def test_permutation_sends_every_place_to_every_place_equally_often(n):
    keys = 400 * n
    counts = Counter((i, Permutation(n, key)[i]) for key in range(keys) for i in range(n))
    expected = keys / n
    chi_square = sum((counts[i, j] - expected) ** 2 / expected for i in range(n) for j in range(n))
    # (n-1)^2 degrees of freedom, six standard deviations
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5 + 6


def test_a_permutation_without_mixing_would_be_noticed():
    class Shift(Permutation):
        def __getitem__(self, i):
            return (i + self.keys[0]) % self.n

    # The check above would accept a rotation; neighbours tell it apart.
    def kept(kind):
        p = kind(1000, key=5)
        return sum(p[i + 1] - p[i] == 1 for i in range(999))

    assert kept(Shift) > 900
    assert kept(Permutation) < 20


def test_look_up_needs_no_list_of_samples():
    order = EpochOrder([10**9] * 3, key=1, block=10_000, shuffle=True)
    shard, sample = order[2_345_678_901]
    assert 0 <= shard < 3 and 0 <= sample < 10**9


def test_samples_stay_inside_their_block_of_positions():
    plain = EpochOrder([50, 50], key=9, block=10**9, shuffle=False)
    order = EpochOrder([50, 50], key=9, block=10, shuffle=True)
    shards = order.shards
    for p in range(100):
        shard, sample = order[p]
        # position of that sample before samples were permuted
        assert (shards.index(shard) * 50 + sample) // 10 == p // 10
    assert [plain[p] for p in range(100)] == [(p // 50, p % 50) for p in range(100)]


def test_epochs_and_seeds_differ():
    def walk_order(key):
        order = EpochOrder([13, 5, 20], key, 10, True)
        return [order[p] for p in range(38)]

    assert walk_order(1) == walk_order(1)
    assert walk_order(1) != walk_order(2)


@pytest.mark.parametrize("world_size", [2, 3, 8, 96])
@pytest.mark.parametrize("slots", [96, 97, 128])
@pytest.mark.parametrize("sizes", [[400, 37, 1, 250], [5, 3], [96], [97]])
def test_global_batches_are_the_same_for_every_rank_count_and_accumulation(sizes, slots, world_size):
    one = walk(sizes, slots, 1)
    assert walk(sizes, slots, world_size) == one
    assert walk(sizes, slots, world_size, accumulation=4) == one


@pytest.mark.parametrize("sizes", [[400, 37, 1, 250], [5, 3], [1], [64], [65]])
@pytest.mark.parametrize("slots", [1, 7, 64])
def test_an_epoch_visits_every_sample_exactly_once(sizes, slots):
    for world_size in (1, 3, 64):
        visited = [v[1:] for step in walk(sizes, slots, world_size).values() for v in step]
        assert len(visited) == sum(sizes)
        assert set(visited) == everything(sizes)


def test_only_the_last_step_has_empty_slots_and_drop_leaves_it_out():
    padded = walk([100, 30], 64, 2)
    assert [len(step) for step in padded.values()] == [64, 64, 2]
    dropped = walk([100, 30], 64, 2, last_batch="drop")
    assert [len(step) for step in dropped.values()] == [64, 64]
    assert all(dropped[step] == padded[step] for step in dropped)


@pytest.mark.parametrize("start", [0, 1, 5, 9])
def test_resume_at_any_step_and_rank_count_equals_the_uninterrupted_run(start):
    whole = walk([400, 37, 1, 250], 73, 3)
    for world_size in (1, 2, 8, 73):
        assert walk([400, 37, 1, 250], 73, world_size, start=start) == {s: v for s, v in whole.items() if s >= start}


def test_another_number_of_slots_changes_the_global_batches():
    assert walk([400, 37], 64, 2)[0] != walk([400, 37], 63, 2)[0]


@pytest.mark.parametrize("slots", [1, 5, 8, 64, 97])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 96])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
def test_all_ranks_have_equal_micro_batches_and_slot_counts_that_differ_by_one(slots, world_size, accumulation):
    ranks = [micro_slots(slots, r, world_size, accumulation) for r in range(world_size)]
    assert len({len(micro) for rank in ranks for micro in rank}) == 1
    assert {len(rank) for rank in ranks} == {accumulation}
    real = [[s for micro in rank for s in micro if s is not None] for rank in ranks]
    assert [s for rank in real for s in rank] == list(range(slots))
    assert max(map(len, real)) - min(map(len, real)) <= 1
    # no more padding than equal sizes need
    widest = max(map(len, real))
    assert len(ranks[0][0]) == -(-widest // accumulation)


def test_slots_read_their_stretch_in_order():
    n, slots = 130, 64
    for slot in range(slots):
        stretch = [position_of(n, slots, slot, t) for t in range(3)]
        used = [p for p in stretch if p is not None]
        assert used == list(range(used[0], used[0] + len(used)))
        assert len(used) in (2, 3)


@pytest.mark.parametrize("steps,weights", [([10, 30, 7], [1, 1, 1]), ([1, 1], [1, 1]), ([5], [0.3]), ([9, 9], [2, 1])])
def test_mixing_gives_every_source_its_share_and_its_own_consecutive_steps(steps, weights):
    mix = Mix(steps, weights, seed=4)
    for epoch in range(3):
        visits = [mix.at(epoch, s) for s in range(mix.steps)]
        for i, own in enumerate(steps):
            mine = [v.epoch * own + v.step for v in visits if v.source == i]
            assert mine == list(range(epoch * mix.visits[i], (epoch + 1) * mix.visits[i]))
    shares = [w * s for w, s in zip(weights, steps, strict=True)]
    for visits, share in zip(mix.visits, shares, strict=True):
        assert abs(visits - mix.steps * share / sum(shares)) < 1


def test_equal_weights_show_every_source_exactly_once_an_epoch():
    mix = Mix([10, 30, 7], [1, 1, 1], seed=0)
    assert mix.visits == [10, 30, 7]
    assert {mix.at(2, s).epoch for s in range(47)} == {2}


def test_mixing_is_even_within_an_epoch():
    mix = Mix([300, 100], [1, 1], seed=0)
    sources = [mix.at(0, s).source for s in range(400)]
    for first in range(0, 400, 40):
        assert 9 <= sum(sources[first : first + 40]) <= 11


def test_no_position_outside_an_epoch():
    order = EpochOrder([3, 4], 1, 10, True)
    for position in (-1, 7):
        with pytest.raises(IndexError):
            order[position]
    with pytest.raises(IndexError):
        Mix([3], [1], 0).at(0, 3)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000])
def test_all_look_ups_at_once_are_those_one_by_one(n):
    for key in (0, 7, 2**64 - 1):
        permutation = Permutation(n, key)
        assert permutation.table().tolist() == [permutation[i] for i in range(n)]


@pytest.mark.parametrize("table", [0, 2**22])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("sizes", [[1], [7, 1, 12], [10, 10, 10], [3, 0, 31]])
def test_many_places_are_those_one_by_one(monkeypatch, sizes, shuffle, table):
    monkeypatch.setattr("mmpeft_ds.data.order.TABLE", table)
    order = EpochOrder(sizes, 11, 8, shuffle)
    positions = np.array([*range(len(order)), 0, len(order) - 1])
    shards, samples = order.many(positions)
    assert list(zip(shards.tolist(), samples.tolist(), strict=True)) == [order[p] for p in positions.tolist()]
    assert [len(a) for a in order.many(positions[:0])] == [0, 0]


def test_many_positions_are_those_one_by_one():
    for n, slots in ((5, 7), (23, 4), (24, 4)):
        for step in range(n // slots + 2):
            one_by_one = [position_of(n, slots, slot, step) for slot in range(slots)]
            found = positions_of(n, slots, np.arange(slots), step).tolist()
            assert found == [-1 if p is None else p for p in one_by_one]
