"""Convolutions across ranks have the gradients of one rank with all samples; wrong variants are seen to differ."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmpeft_ds.distributed import gather as gathering
from mmpeft_ds.distributed import graph_conv
from mmpeft_ds.distributed.batch_graph import Graph, knn_graph, normalised, threshold_graph
from mmpeft_ds.distributed.counters import counted
from mmpeft_ds.distributed.graph_conv import GraphConv
from tests.helpers.forked_ranks import in_ranks
from tests.helpers.references.graph import (
    SPLITS,
    dense,
    features,
    hat,
    knn_matrix,
    one_rank,
    share,
    threshold_matrix,
    weights,
)

TAU, K = 0.5, 3
X = features()
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
VALID = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
TOLERANCE = 1e-12


class Network(nn.Module):
    """Two convolutions, the second of which shrinks, with everything between them."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(6, 5), nn.Linear(5, 6)
        self.conv1, self.conv2 = GraphConv(5, 5), GraphConv(6, 4)

    def forward(self, x, graph):
        return self.conv2(self.up(self.conv1(self.down(x), graph).relu()), graph)


def build(kind, x, valid, **options):
    if kind == "threshold":
        return threshold_graph(x, TAU, valid, **options)
    return knn_graph(x, K, valid=valid, direction=kind, **options)


def matrix(kind, valid):
    if kind == "threshold":
        return threshold_matrix(X, TAU, valid)
    return knn_matrix(X, K, None, valid, torch.arange(12), kind)


def step(rank, split, kind="threshold", valid=VALID, exchange="gather", normalisation="symmetric", variant=""):
    """Logits, loss, gradients averaged over ranks, and the traffic of the two passes."""
    ranks = len(split)
    x, labels, mine = (share(t, split, rank) for t in (X, LABELS, valid))
    x = x.clone().requires_grad_()
    model = Network().double()
    model.load_state_dict(weights())
    break_it(variant)
    options = {"exchange": exchange}
    if variant == "local graph":
        options["group"] = [dist.new_group([r]) for r in range(ranks)][rank]
    graph = build(kind, x, mine, **options)
    if variant == "own-block degrees":
        graph.out_degree = torch.bincount(graph.source, minlength=12)
        graph.in_degree = graph.out_degree[graph.offset : graph.offset + len(x)]
    graph = normalised(graph, normalisation)
    with counted() as forward:
        logits = model(x, graph)
    each = nn.functional.cross_entropy(logits, labels, reduction="none")[mine]
    loss = ranks / int(valid.sum()) * each.sum()
    if variant == "padding in the denominator":
        loss = ranks / (ranks * max(split)) * each.sum()
    elif variant == "local mean":
        loss = each.mean()
    with counted() as backward:
        loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for grad in [*found.values(), loss := loss.detach()]:
        dist.all_reduce(grad)
        grad /= ranks
    found |= {"x": x.grad / ranks, "logits": logits.detach(), "loss": loss}
    return {k: v.numpy() for k, v in found.items()} | {
        "forward": dict(forward.calls),
        "backward": dict(backward.calls),
    }


def break_it(variant):
    """Put something wrong in place of the gather, in the process of one rank."""

    def own_slot_only(x, counts=None, group=None):
        everyone = gathering.gather_rows(x.detach(), counts, group)
        start = sum(counts[: dist.get_rank(group)])
        return torch.cat([everyone[:start], x, everyone[start + len(x) :]])

    def averages(x, counts=None, group=None):
        everyone = gathering.gather_rows(x, counts, group)
        if everyone.requires_grad:
            everyone.register_hook(lambda grad: grad / dist.get_world_size(group))
        return everyone

    wrong = {"own slot only": own_slot_only, "backward averages": averages}
    graph_conv.gather_rows = wrong.get(variant, gathering.gather_rows)


def worst(ranks, want, valid):
    """Largest error of the logits and of each gradient, relative to its largest entry; `ranks`: one step of each."""
    off = {}
    for name, right in want.items():
        if name in ("x", "logits"):
            got, right = torch.cat([torch.from_numpy(r[name]) for r in ranks])[valid], right[valid]
        else:
            got = torch.from_numpy(ranks[0][name])
        off[name] = ((got - right).abs().max() / right.abs().max()).item()
    return off


CASES = [
    {"kind": kind, "normalisation": normalisation, "exchange": exchange}
    for kind, normalisation in (("threshold", "symmetric"), ("to_neighbour", "symmetric"), ("from_neighbour", "mean"))
    for exchange in ("gather", "ring")
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_ranks_give_the_gradients_of_one(split):
    ranks = in_ranks(lambda rank: [step(rank, split, **case) for case in CASES], ranks=len(split))
    for case, steps in zip(CASES, zip(*ranks, strict=True), strict=True):
        want = one_rank(X, LABELS, VALID, hat(matrix(case["kind"], VALID), case["normalisation"]))
        off = worst(steps, want, VALID)
        assert max(off.values()) < TOLERANCE, (case, off)
        if len(split) == 1:
            continue
        # each convolution gathers once forward, and gives back once
        shifts = {"shift": 2 * (len(split) - 1)}
        for rank in steps:
            if case["exchange"] == "ring":
                assert rank["forward"] == rank["backward"] == shifts
            else:
                assert rank["forward"] == {"all_gather": 2} and rank["backward"] == {"reduce_scatter": 2}


def test_a_rank_without_a_valid_row_takes_part():
    """It has no edge at all, not even to itself; in_ranks waits a minute at most."""
    valid = torch.arange(12) < 6
    cases = [{"valid": valid, "exchange": exchange} for exchange in ("gather", "ring")]
    for steps in zip(*in_ranks(lambda rank: [step(rank, [6, 6], **case) for case in cases]), strict=True):
        off = worst(steps, one_rank(X, LABELS, valid, hat(matrix("threshold", valid))), valid)
        assert max(off.values()) < TOLERANCE, off


EVERYONE = torch.ones(12, dtype=torch.bool)


@pytest.mark.parametrize(
    "variant, split, gradient, logits_wrong",
    [
        ("own slot only", [6, 6], 0.1, False),
        ("backward averages", [6, 6], 0.1, False),
        ("local graph", [6, 6], 0.1, True),
        ("own-block degrees", [6, 6], 0.1, True),
        ("padding in the denominator", [5, 4, 3], 0.1, False),
        ("local mean", [5, 4, 3], 0.01, False),
    ],
)
def test_wrong_variants_have_wrong_gradients(variant, split, gradient, logits_wrong):
    """Negative controls; logits alone would pass four of the six."""
    want = one_rank(X, LABELS, EVERYONE, hat(matrix("threshold", EVERYONE)))
    ranks = in_ranks(lambda rank: step(rank, split, valid=EVERYONE, variant=variant), ranks=len(split))
    off = worst(ranks, want, EVERYONE)
    assert max(off.values()) > gradient
    assert (off["logits"] > 1e-3) == logits_wrong
    if variant in ("own slot only", "backward averages"):
        assert off["conv2.bias"] < TOLERANCE, "right even with a broken gather"


def bytes_of_pass(rank, shape, dtype):
    x = features(5, 7, seed=rank).to(dtype).requires_grad_()
    graph = normalised(threshold_graph(x, 0.0))
    conv = GraphConv(*shape).to(dtype)
    with counted() as forward:
        y = conv(x, graph)
    with counted() as backward:
        y.sum().backward()
    return dict(forward.bytes), dict(backward.bytes)


def test_the_narrower_side_travels():
    shapes = (((7, 3), 3), ((7, 20), 7))
    for rank in in_ranks(lambda rank: [bytes_of_pass(rank, shape, torch.float32) for shape, _ in shapes], ranks=3):
        for (forward, backward), (_, width) in zip(rank, shapes, strict=True):
            assert forward == {"all_gather": 2 * 5 * width * 4} and backward == {"reduce_scatter": 2 * 5 * width * 4}


def test_half_precision_travels_as_it_is_and_is_summed_in_float32():
    for forward, backward in in_ranks(bytes_of_pass, (7, 3), torch.bfloat16):
        assert forward == {"all_gather": 5 * 3 * 2} and backward == {"reduce_scatter": 5 * 3 * 4}


def summed_in_half(rank):
    """256 + 1 + 1: bfloat16 holds 256 and 258, so rounding after each sum would leave 256."""
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    everyone = gathering.gather_rows(x)
    (everyone * torch.tensor([256.0, 1.0, 1.0])[rank].bfloat16()).sum().backward()
    return float(x.grad)


def test_gradients_in_half_precision_are_rounded_once():
    assert in_ranks(summed_in_half, ranks=3) == [258.0] * 3


# ------------------------------------------------------------------------------------------------------- one process


def test_single_messages_add_up_to_the_fused_sum():
    graph = normalised(threshold_graph(X, TAU))
    conv = GraphConv(6, 4, bias=False).double()
    single = conv.propagate(graph.edge_index, x=X @ conv.weight, edge_weight=graph.weight, size=(12, 12))
    torch.testing.assert_close(single, conv(X, graph), atol=1e-14, rtol=0)


def test_a_doubled_self_loop_counts_twice():
    x = features(8, 4, seed=2)
    x[5], x[6] = x[2], x[2]
    graph = knn_graph(x, 3, 0.4, released=True)
    conv = GraphConv(4, 4, bias=False).double()
    torch.testing.assert_close(conv(x, normalised(graph)), hat(dense(graph)) @ x @ conv.weight, atol=1e-14, rtol=0)


def test_activations_of_lower_precision_are_cast_at_the_edge():
    graph = normalised(threshold_graph(X, TAU))
    conv = GraphConv(6, 4)
    y = conv(X.bfloat16(), graph)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_weights_start_as_glorot_and_biases_as_zero():
    conv = GraphConv(40, 60)
    assert conv.weight.abs().max() <= (6 / 100) ** 0.5 and conv.weight.std() > 0.1 and not conv.bias.any()


def test_isolated_and_invalid_rows_get_themselves_and_nothing():
    valid = torch.tensor([True, True, False])
    graph = normalised(threshold_graph(torch.eye(3, dtype=torch.float64), 0.5, valid))
    conv = GraphConv(3, 2).double()
    with torch.no_grad():
        conv.bias.fill_(0.5)
    y = conv(torch.eye(3, dtype=torch.float64), graph)
    torch.testing.assert_close(y[:2], conv.weight[:2] + 0.5)
    assert (y[2] == 0.5).all()
    assert isinstance(graph, Graph) and graph.in_degree.tolist() == [1, 1, 0]
