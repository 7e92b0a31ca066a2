"""Graphs built by several ranks are those of one rank with all samples, edge for edge."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmpeft_ds.distributed import batch_graph as graphs
from mmpeft_ds.distributed import graph_nodes
from mmpeft_ds.distributed.batch_graph import knn_graph, normalised, threshold_graph
from mmpeft_ds.distributed.counters import counted
from mmpeft_ds.ops.graph_topk import SPARE
from tests.helpers.forked_ranks import in_ranks
from tests.helpers.references.graph import SPLITS, dense, features, hat, knn_matrix, share, threshold_matrix

TAU, K = 0.5, 3
X = features()
X[7] = X[2]  # a tie
KEY = torch.tensor([5, 3, 11, 0, 9, 1, 7, 2, 10, 4, 8, 6])
VALID = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
KINDS = {
    "threshold": {},
    "to": {"direction": "to_neighbour"},
    "to, threshold": {"direction": "to_neighbour", "tau": TAU},
    "from": {"direction": "from_neighbour"},
    "symmetric": {"symmetric": True, "tau": TAU},
}


def build(kind, x, valid, key, **options):
    if kind == "threshold":
        return threshold_graph(x, TAU, valid, **options)
    return knn_graph(x, K, valid=valid, key=key, **KINDS[kind], **options)


def want(kind, valid):
    if kind == "threshold":
        return threshold_matrix(X, TAU, valid)
    return knn_matrix(X, K, KINDS[kind].get("tau"), valid, KEY, *(KINDS[kind].get(n, d) for n, d in _DEFAULTS.items()))


_DEFAULTS = {"direction": "to_neighbour", "symmetric": False}


EXCHANGES = [("gather", None), ("ring", 16)]


def matrices(rank, split):
    """Of each kind and exchange: all samples valid, and some not; plain and normalised, and the degrees."""
    found = {}
    everyone = torch.ones(12, dtype=torch.bool)
    for kind, valid, (exchange, chunk) in itertools.product(KINDS, (everyone, VALID), EXCHANGES):
        mine = [share(t, split, rank) for t in (X, valid, KEY)]
        graph = build(kind, *mine, exchange=exchange, chunk=chunk)
        assert graph.edge_index.dtype == torch.int64 and (graph.target.diff() >= 0).all()
        found[kind, bool(valid.all()), exchange] = [
            dense(graph).numpy(),
            dense(normalised(graph, "symmetric")).numpy(),
            dense(normalised(graph, "mean")).numpy(),
            graph.in_degree.numpy(),
            graph.out_degree.numpy(),
        ]
    return found


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_ranks_build_the_graph_of_one(split):
    ranks = in_ranks(matrices, split, ranks=len(split))
    for case, first in ranks[0].items():
        A = want(case[0], torch.ones(12, dtype=torch.bool) if case[1] else VALID)
        rows = [np.concatenate([r[case][part] for r in ranks]) for part in range(4)]
        np.testing.assert_array_equal(rows[0], A.numpy(), err_msg=str(case))
        np.testing.assert_allclose(rows[1], hat(A).numpy(), atol=1e-15)
        np.testing.assert_allclose(rows[2], hat(A, "mean").numpy(), atol=1e-15)
        np.testing.assert_array_equal(rows[3], A.sum(1).numpy())
        np.testing.assert_array_equal(first[4], A.sum(0).numpy())


def only_one(rank):
    """One valid row among those of both ranks; its width is no multiple of a key's, or a column of a transpose."""
    valid = torch.tensor([False, False, rank == 0])
    shapes = features(3, 5).bfloat16(), features(5, 3).T[:, :1]
    return [edges_of(build(kind, x, valid, KEY[:3])) for kind in KINDS for x in shapes]


def test_a_graph_of_one_row_has_its_loop():
    first, second = in_ranks(only_one)
    assert all(edges == ([[2], [2]], [0, 0, 1], [0, 0, 1, 0, 0, 0]) for edges in first)
    assert all(edges == ([[], []], [0, 0, 0], [0, 0, 1, 0, 0, 0]) for edges in second)


# ------------------------------------------------------------------------------------------------- symmetry at tau


def planted():
    """Float32 rows; many cosines lie within 1e-7 of 0.7."""
    x = torch.zeros(45, 96, dtype=torch.float64)
    x[0, 0] = 1
    x[1:, 0] = 0.7 + torch.linspace(-1e-7, 1e-7, 44, dtype=torch.float64)
    x[1:, 1:] = torch.nn.functional.normalize(features(44, 95, seed=1), dim=1) * (1 - x[1:, :1] ** 2).sqrt()
    return x.float()[torch.randperm(45, generator=torch.Generator().manual_seed(0))]


def at_tau(rank, split):
    graph = threshold_graph(share(planted(), split, rank), 0.7)
    return dense(graph).numpy()


def test_the_graph_is_symmetric_and_that_of_one_rank_with_cosines_within_1e_7_of_tau():
    (alone,) = in_ranks(at_tau, [45], ranks=1)
    assert 10 < alone.sum() < 45 * 45
    for split in ([23, 22], [20, 0, 25], [7, 11, 13, 14]):
        A = np.concatenate(in_ranks(at_tau, split, ranks=len(split)))
        np.testing.assert_array_equal(A, A.T)
        np.testing.assert_array_equal(A, alone)


def test_a_graph_found_as_a_whole_is_symmetric_like_one_of_halves(monkeypatch):
    whole = dense(threshold_graph(planted(), 0.7))
    monkeypatch.setattr(graph_nodes, "FEW_PRODUCTS", 0)
    np.testing.assert_array_equal(whole, dense(threshold_graph(planted(), 0.7)))
    np.testing.assert_array_equal(whole, whole.T)


# ------------------------------------------------------------------------------------------------------- invariance


def padded(rank, padding):
    x = torch.cat([share(X, [6, 6], rank), features(padding, seed=rank)])
    valid = torch.arange(len(x)) < 6
    found = []
    for kind in KINDS:
        graph = build(kind, x, valid, torch.cat([share(KEY, [6, 6], rank), torch.arange(padding) + 100]))
        real = torch.cat([torch.arange(6), torch.arange(6) + 6 + padding])
        A = dense(normalised(graph))
        assert (A > 0).sum() == (A[:6, real] > 0).sum(), "an edge to or from padding"
        found.append(A[:6, real].numpy())
    return found


def test_the_amount_of_padding_does_not_matter():
    bare, some, more = (in_ranks(padded, n) for n in (0, 1, 5))
    for rank in range(2):
        for a, b, c in zip(bare[rank], some[rank], more[rank], strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


def moved(rank, order, split):
    x, key = (share(t[order], split, rank) for t in (X, KEY))
    return dense(knn_graph(x, 1, key=key)).numpy()


def test_ties_go_by_key_when_samples_move_between_ranks():
    (still,) = in_ranks(moved, torch.arange(12), [12], ranks=1)
    # rows 2 and 7 are equal; each is the other's nearest, and for a third it is the one with the smaller key
    for seed in range(3):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        A = np.concatenate(in_ranks(moved, order, [5, 7], ranks=2))
        np.testing.assert_array_equal(A, still[order][:, order])


def in_pairs(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    split = [[6, 6], [12]][rank // 2]
    x = share(X, split, rank % 2)
    found = [
        dense(build(kind, x, None, share(KEY, split, rank % 2), group=groups[rank // 2], exchange=exchange)).numpy()
        for kind in KINDS
        for exchange in ("gather", "ring")
    ]
    return found


def test_a_process_group_has_a_graph_of_its_own():
    first, second, alone = in_ranks(in_pairs, ranks=3)
    for a, b, whole in zip(first, second, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate([a, b]), whole)


def with_nobody(rank):
    """All ranks empty, or all rows invalid."""
    graphs_ = [build(kind, X[:0], None, KEY[:0]) for kind in KINDS]
    graphs_ += [build(kind, X[:2], torch.zeros(2, dtype=torch.bool), KEY[:2]) for kind in KINDS]
    return [(len(g.source), g.num_targets, g.num_sources, int(g.out_degree.sum())) for g in graphs_]


def test_no_sample_at_all_is_a_graph_without_edges():
    assert in_ranks(with_nobody) == [[(0, 0, 0, 0)] * 5 + [(0, 2, 4, 0)] * 5] * 2


# -------------------------------------------------------------------------------------------------- special graphs


def test_empty_and_complete_graphs():
    x = torch.eye(5, dtype=torch.float64)
    assert torch.equal(dense(threshold_graph(x, 0.1)), torch.eye(5, dtype=torch.float64))
    assert torch.equal(dense(threshold_graph(x + 9, 0.1)), torch.ones(5, 5, dtype=torch.float64))


def test_a_dropped_first_hit_that_is_not_the_sample_doubles_its_self_loop():
    """Rows 2, 5 and 6 are equal: the released search names row 6 first for each of them."""
    x = features(8, 4, seed=2)
    x[5], x[6] = x[2], x[2]
    released = dense(knn_graph(x, 3, 0.4, released=True))
    assert released.diagonal().tolist() == [1, 1, 2, 1, 1, 2, 1, 1]
    assert released[6, 2] == released[6, 5] == 0, "the dropped hit"
    mended = dense(knn_graph(x, 3, 0.4))
    assert mended.diagonal().tolist() == [1] * 8 and mended[6, 2] == mended[6, 5] == 1


def test_released_and_mended_agree_without_equal_rows():
    x = features(16, seed=5)
    assert torch.equal(dense(knn_graph(x, 4, 0.2, released=True)), dense(knn_graph(x, 4, 0.2)))


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"direction": "from_neighbour"}, {"released": True}])
@pytest.mark.parametrize("k", [1, 5, 11, 12, 20])
def test_lists_that_are_full_make_the_edges_that_they_make_entry_by_entry(k, options):
    """No cosine is below -1: with that threshold the same neighbours are kept, but nobody knows so beforehand."""
    assert edges_of(knn_graph(X, k, **options)) == edges_of(knn_graph(X, k, tau=-1.0, **options))


def test_direction_is_a_transpose():
    to, back = (dense(knn_graph(X, 2, direction=d)) for d in graphs.DIRECTIONS)
    assert torch.equal(to, back.T) and not torch.equal(to, to.T)
    assert (to.sum(0) == 3).all() and (back.sum(1) == 3).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: threshold_graph(X, 1.5), "tau 1.5"),
        (lambda: threshold_graph(X[0], 0.5), "features have shape"),
        (lambda: threshold_graph(X, 0.5, VALID[:3]), "valid has shape"),
        (lambda: threshold_graph(X, 0.5, exchange="pigeon"), "gather, ring"),
        (lambda: knn_graph(X, 0), "at least 1"),
        (lambda: knn_graph(X, 1, key=KEY.int()), "torch.int64"),
        (lambda: knn_graph(X, 1, direction="up"), "to_neighbour"),
        (lambda: knn_graph(X, 1, released=True, symmetric=True), "never symmetric"),
        (lambda: normalised(threshold_graph(X, 0.5), "max"), "symmetric, mean"),
    ],
)
def test_wrong_options_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------------------------------------- health and counting


def health(rank):
    split, labels = [5, 7], torch.tensor([0, 0, 1, 1, -1, 0, 1, 0, 1, 0, 1, 0])
    graph = threshold_graph(share(X, split, rank), TAU, share(VALID, split, rank))
    with counted() as during:
        found = graph.health(share(labels, split, rank))
    assert set(found) - set(graph.health()) == {"labelled_edges", "same_class_edges"}
    return found, during.total_calls


def test_health_adds_up_over_ranks():
    (a, calls), (b, _) = in_ranks(health)
    assert calls == 1
    A = threshold_matrix(X, TAU, VALID).fill_diagonal_(0).numpy()
    labels = np.array([0, 0, 1, 1, -1, 0, 1, 0, 1, 0, 1, 0])
    known = (labels[:, None] >= 0) & (labels >= 0)
    assert a["nodes"] + b["nodes"] == VALID.sum()
    assert a["edges"] + b["edges"] == A.sum()
    assert a["isolated"] + b["isolated"] == ((A.sum(1) == 0) & VALID.numpy()).sum()
    assert a["labelled_edges"] + b["labelled_edges"] == (A * known).sum()
    same = (A * known * (labels[:, None] == labels)).sum()
    assert 0 < same < A.sum() and a["same_class_edges"] + b["same_class_edges"] == same
    assert a["gather_ms"] > 0 and a["gather_bytes"] > 0


def traffic(rank, ranks):
    B, D = 24, 10
    x = features(B * ranks, D)[rank * B :][:B].float()
    valid, key = torch.arange(B) > 0, torch.arange(B) + rank * B
    found, limits = {}, [getattr(graph_nodes, name) for name in LIMITS]
    for size, (message, twice, whole) in SIZES.items():
        set_limits(message, twice, whole)
        for exchange in ("gather", "ring"):
            options = {"counts": [B] * ranks, "exchange": exchange}
            for name, graph in (
                ("threshold", threshold_graph(x, 0.3, **options)),
                ("knn", knn_graph(x, 5, key=key, **options)),
                ("some valid", threshold_graph(x, 0.3, valid, exchange=exchange)),
            ):
                said = dict(graph.traffic.calls), dict(graph.traffic.bytes), graph.traffic.seconds > 0
                found[name, exchange, size] = (*said, edges_of(graph))
    set_limits(*limits)
    return found


LIMITS = ("ONE_MESSAGE", "FEW_PRODUCTS", "WHOLE_PRODUCTS")
SIZES = {"tiny": (2**24, 2**24, 2**24), "small": (2**24, 2**24, 0), "large": (0, 0, 0)}  # what these few rows count as


def set_limits(*values):
    for name, value in zip(LIMITS, values, strict=True):
        setattr(graph_nodes, name, value)


def edges_of(graph):
    return graph.edge_index.tolist(), graph.in_degree.tolist(), graph.out_degree.tolist()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives_and_bytes_are_those_of_the_cost_table(ranks):
    B, D, k, others = 24, 10, 5, ranks - 1
    for found in in_ranks(traffic, ranks, ranks=ranks):
        for name in ("threshold", "knn", "some valid"):
            same = [found[name, exchange, size][3] for exchange in ("gather", "ring") for size in SIZES]
            assert same[0][0][0] and same == same[:1] * 6
        sent = {case: rest[:3] for case, rest in found.items()}
        features_, bits, lists = others * B * D * 4, others * B * (B * ranks // 8), others * B * k * 4
        key, calls = others * B * 8, {"all_gather": 2}
        # every rank finds the edges of all: nothing but what they are found by travels
        assert sent["threshold", "gather", "tiny"] == ({"all_gather": 1}, {"all_gather": features_}, True)
        assert sent["knn", "gather", "tiny"] == ({"all_gather": 1}, {"all_gather": key + features_}, True)
        assert sent["threshold", "gather", "small"] == (calls, {"all_gather": features_ + bits}, True)
        assert sent["threshold", "gather", "large"] == sent["threshold", "gather", "small"]
        # one message with features, keys and places, every pair computed at both of its ends
        assert sent["knn", "gather", "small"] == (calls, {"all_gather": key + features_ + lists}, True)
        # every pair is computed once: a cosine and a number of each candidate for the other end of it
        halves = others * B * (k + SPARE) * 8
        assert sent["knn", "gather", "large"] == (
            {"all_gather": 3, "all_to_all": 1},
            {"all_gather": key + features_ + lists, "all_to_all": halves},
            True,
        )
        for size in SIZES:
            shift = {"shift": others}
            assert sent["threshold", "ring", size] == (
                {"all_gather": 1} | shift,
                {"all_gather": bits, "shift": features_},
                True,
            )
            assert sent["knn", "ring", size] == (calls | shift, {"all_gather": key + lists, "shift": features_}, True)
        # of 23 valid rows of each rank; how many rows and valid ones there are, places, features, bits
        V = B - 1
        some = others * (16 + V * 8 + V * D * 4 + V * -(-V * ranks // 8))
        fewer = some - others * V * -(-V * ranks // 8)
        assert sent["some valid", "gather", "tiny"] == ({"all_gather": 2}, {"all_gather": fewer}, True)
        assert sent["some valid", "gather", "small"] == ({"all_gather": 3}, {"all_gather": some}, True)
        assert sent["some valid", "gather", "large"] == ({"all_gather": 4}, {"all_gather": some}, True)


def test_building_alone_needs_no_collective():
    assert threshold_graph(X, TAU).traffic.total_calls == knn_graph(X, 2).traffic.total_calls == 0
