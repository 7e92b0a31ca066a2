"""The k nearest rows: against a full sort, in tiles, with ties, in bounded memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft_ds.ops import graph_topk
from mmpeft_ds.ops.graph_topk import SPARE, best_of, nearest, settled, shared_candidates
from mmpeft_ds.ops.similarity_graph import Rows, cosines_at


def features(rows, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + 0.4


def by_full_sort(x, keys, k, with_self=False):
    """Positions by exact cosine, then key."""
    rows = Rows.of(x)
    i, j = torch.ones(len(x), len(x)).nonzero(as_tuple=True)
    cos = cosines_at(rows, rows, i, j).view(len(x), len(x)).tolist()
    best = []
    for row in range(len(x)):
        others = [c for c in range(len(x)) if with_self or c != row]
        best.append(sorted(others, key=lambda c: (-cos[row][c], keys[c]))[:k])
    return torch.tensor([b + [-1] * (k - len(b)) for b in best])


def same_sets(got, want):
    assert torch.equal(got.sort(1).values, want.sort(1).values)


@pytest.mark.parametrize("with_self", [False, True])
@pytest.mark.parametrize("k, chunk", [(1, None), (5, None), (5, 9), (5, 64), (5, 1000), (30, 200), (80, None)])
def test_hits_are_those_of_a_full_sort_whatever_the_tile(k, chunk, with_self):
    x, keys = features(70), torch.arange(70)
    found = nearest(Rows.of(x), Rows.of(x), keys, k, with_self=with_self, chunk=chunk)
    same_sets(found.position, by_full_sort(x, keys.tolist(), k, with_self))
    assert ((found.position == -1) == (found.cosine == -float("inf"))).all()


@pytest.mark.parametrize("copies", [3, 2 * SPARE + 9])
@pytest.mark.parametrize("chunk", [None, 16, 300])
def test_equal_rows_are_ordered_by_key_wherever_they_stand(copies, chunk):
    """Fewer copies than candidates are kept, and more."""
    x = torch.cat([features(20), features(1, seed=3).expand(copies, -1)])
    keys = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    want = by_full_sort(x, keys.tolist(), 4)
    found = nearest(Rows.of(x), Rows.of(x), keys, 4, chunk=chunk, exact=True)
    assert torch.equal(found.position, want)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    moved = nearest(Rows.of(x[order]), Rows.of(x[order]), keys[order], 4, chunk=chunk, exact=True)
    assert torch.equal(keys[order][moved.position], keys[want][order])


def test_ties_by_position_would_not_do():
    """Negative control: with positions as keys, moving the rows moves the hits."""
    x = torch.cat([features(5), features(1, seed=3).expand(30, -1)])
    positions, order = torch.arange(35), torch.randperm(35, generator=torch.Generator().manual_seed(2))
    here = nearest(Rows.of(x), Rows.of(x), positions, 4, exact=True).position
    moved = nearest(Rows.of(x[order]), Rows.of(x[order]), positions, 4, exact=True).position
    assert not torch.equal(order[moved], here[order])


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_candidates_are_taken_as_they_come_unless_the_kth_and_the_next_are_near(k, monkeypatch):
    keys = torch.arange(60)
    apart, twins = features(60), features(30, 64).repeat(2, 1) + 2e-7 * features(60, 64, seed=1)
    for x in (apart, twins):
        found = nearest(Rows.of(x), Rows.of(x), keys, k)
        same_sets(found.position, by_full_sort(x, keys.tolist(), k))
        assert torch.equal(found.key, keys[found.position]) and found.cosine.dtype == torch.float64
    # negative control: after its twin a row's candidates come in pairs that float32 cannot tell apart
    monkeypatch.setattr(graph_topk, "margin", lambda rows: 0.0)
    wrong = nearest(Rows.of(twins), Rows.of(twins), keys, k).position
    assert torch.equal(wrong.sort(1).values, by_full_sort(twins, keys.tolist(), k).sort(1).values) == (k % 2 == 1)


def together(x, keys, k, splits, **options):
    """Positions, as ranks find them that compute each pair once."""
    rows, found, start = Rows.of(x), [], 0
    for size in splits:
        own = rows[start : start + size]
        found.append((own, *shared_candidates(own, rows, k, **options)))
        start += size
    hits = []
    for own, values, columns, *_ in found:
        here = slice(own.start, own.start + len(own))
        values = [values, *(others[3][here] for others in found)]
        columns = [columns, *(others[4][here] for others in found)]
        best = best_of(values, columns, k + SPARE)
        hits.append(settled(own, rows, keys, k, *best, exact=True, **options).position)
    return torch.cat(hits)


@pytest.mark.parametrize("with_self", [False, True])
@pytest.mark.parametrize("chunk", [None, 7, 64])
@pytest.mark.parametrize("copies", [1, 2, 2 * SPARE + 9])
def test_each_pair_computed_once_gives_the_same_hits(copies, chunk, with_self):
    x = torch.cat([features(24), features(1, seed=3).expand(copies, -1)])
    total = len(x)
    keys = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    want = by_full_sort(x, keys.tolist(), 4, with_self)
    for splits in ([total], [10, total - 10], [5, 0, total - 5]):
        assert torch.equal(together(x, keys, 4, splits, chunk=chunk, with_self=with_self), want)


def test_rows_without_direction_tie_at_zero():
    x = torch.cat([torch.zeros(25, 4), features(3, 4)])
    keys = torch.arange(28).flip(0)
    found = nearest(Rows.of(x), Rows.of(x), keys, 3, exact=True)
    assert torch.equal(found.position, by_full_sort(x, keys.tolist(), 3))


@pytest.mark.parametrize("cuts", [[0, 30, 60], [0, 1, 2, 60], [0, 0, 45, 60]])
def test_blocks_merge_to_the_whole(cuts):
    x = torch.cat([features(40), features(1, seed=3).expand(20, -1)])
    rows, keys = Rows.of(x), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    parts = [
        nearest(rows, rows[a:b], keys[a:b], 6, exact=True, chunk=90) for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = nearest(rows, rows, keys, 6, exact=True)
    assert torch.equal(merged.position, whole.position) and torch.equal(merged.cosine, whole.cosine)


def test_cosines_at_tau_lie_on_the_right_side_of_it():
    x = torch.tensor([[3.0, 4.0], [5.0, 0.0], [1.0, 7.0]])
    found = nearest(Rows.of(x), Rows.of(x), torch.arange(3), 2, tau=0.6)
    assert found.cosine[0, (found.position[0] == 1).nonzero().item()] == 0.6


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("crowded", [False, True])
def test_memory_is_that_of_the_hits_and_one_chunk(crowded):
    x = features(1500, 4) if not crowded else torch.cat([features(1400, 4), features(1, 4).expand(100, -1)])
    rows, k, chunk = Rows.of(x), 5, 8192
    with Largest() as largest:
        nearest(rows, rows, torch.arange(1500), k, chunk=chunk)
    assert largest.numel <= max(chunk, 2 * len(x) * (k + SPARE), 4 * 2**15)
    with Largest() as largest:
        nearest(rows, rows, torch.arange(1500), k, chunk=2**24)
    assert largest.numel >= 1500 * 1500, "the control: with a large chunk the similarity is held"
