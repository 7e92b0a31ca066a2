"""GA-Net over ranks gives the logits, loss and every gradient of one rank with all rows, in float64;
variants that are wrong are found by their gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from mmpeft_ds import GaNetConfig
from mmpeft_ds.distributed import graph_conv, graph_nodes
from mmpeft_ds.distributed.batch_graph import threshold_graph as real_threshold
from mmpeft_ds.distributed.counters import counted
from mmpeft_ds.distributed.gather import gather_rows as real_gather
from mmpeft_ds.methods.ga_net import head as ga_net_head
from tests.helpers.forked_ranks import in_ranks
from tests.helpers.goldens import GOLDENS_DIR, Golden
from tests.helpers.models import tiny_feature_model
from tests.helpers.models.tiny_ga_net import NAMES
from tests.helpers.references import ga_net as oracle

WIDTH, CLASSES, R = 6, 4, 5  # of each modality
SPLITS = [(12,), (6, 6), (4, 4, 4), (3, 3, 3, 3), (5, 4, 3), (6, 0, 6)]
KINDS = {  # options of the method, and how the oracle makes the same graph
    "linear": ({"variant": "v1", "train": "all", "tau": 0.3}, "threshold"),
    "relu": ({"variant": "v1", "train": "all", "tau": 0.3, "activation": "relu", "residual": True}, "threshold"),
    "ring": ({"variant": "v1", "train": "all", "tau": 0.3, "exchange": "ring"}, "threshold"),
    "directed": ({"variant": "v2", "train": "all", "tau": -0.2, "k": 3, "fusion": False, "up": "joined"}, "directed"),
    "mean": (
        {"graph": "knn", "tau": -0.2, "k": 3, "symmetric": False, "normalise_similarity": False,
         "normalisation": "mean", "exchange": "ring"},
        "hearing",
    ),
    "both ways": ({"graph": "knn", "tau": -0.2, "k": 3, "normalise_similarity": False}, "both_ways"),
}  # fmt: skip


def network(options):
    """The peft model in float64, with biases that are not zero."""
    base = tiny_feature_model.model(classes=CLASSES, width=WIDTH, text_width=WIDTH, templates=0, support=0)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, GaNetConfig(r=R, **options)).double()
    head = base.features.head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.5)
    return model, head


def data(rows=12):
    """Rows in loose clusters, so that graphs are neither empty nor full."""
    made = torch.Generator().manual_seed(11)
    centres = torch.randn(3, 2 * WIDTH, generator=made, dtype=torch.float64)
    x = centres[torch.arange(rows) % 3] + 0.9 * torch.randn(rows, 2 * WIDTH, generator=made, dtype=torch.float64)
    return x, torch.randint(CLASSES, (rows,), generator=made)


def own_rows(rank, split, x, labels, padding):
    """This rank's rows as leaf, labels, valid, ids; `padding` rows that hold NaN after them."""
    start = sum(split[:rank])
    mine = slice(start, start + split[rank])
    rows = torch.cat([x[mine], torch.full((padding, x.shape[1]), torch.nan, dtype=x.dtype)])
    valid = torch.arange(len(rows)) < split[rank]
    key = torch.cat([torch.arange(len(x))[mine], torch.full((padding,), 99)])
    target = torch.cat([labels[mine], torch.zeros(padding, dtype=torch.int64)])
    return rows.requires_grad_(), target, valid, key


def share(rank, split, options, x, labels, padding=(), weights=None, scale=None):
    """What one rank of a data-parallel run finds: its logits, loss and gradients averaged over ranks."""
    model, head = network(options)
    if weights is not None:
        head.load_state_dict({**head.state_dict(), **weights})
    rows, target, valid, key = own_rows(rank, split, x, labels, padding[rank] if padding else 0)
    out = model(
        text_features=rows[:, : x.shape[1] // 2], image_features=rows[:, x.shape[1] // 2 :], valid=valid, key=key
    )
    losses = cross_entropy(out.logits, target, reduction="none")[valid]
    scale = len(split) / len(x) if scale is None else scale(rank, split)
    loss = scale * losses.sum()
    loss.backward()
    found = {name: p.grad / len(split) for name, p in head.named_parameters()}
    for gradient in (*found.values(), mean_loss := loss.detach() / len(split)):
        if dist.is_initialized():
            dist.all_reduce(gradient)
    found["x"] = rows.grad[valid] / len(split)
    return {
        "logits": out.logits[valid].detach().numpy(),
        "loss": mean_loss.numpy(),
        **{name: g.numpy() for name, g in found.items()},
    }


def over(split, *args, **kwargs):
    """`share` on as many ranks as `split` has; rows joined in rank order."""
    return all_over(split, [(args, kwargs)])[0]


def all_over(split, jobs):
    """`over` for each (args, kwargs), in one process group."""
    ranks = in_ranks(lambda rank: [share(rank, split, *args, **kwargs) for args, kwargs in jobs], ranks=len(split))
    return [joined(parts) for parts in zip(*ranks, strict=True)]


def joined(parts):
    """What ranks have in common, once; their rows one after the other."""
    found = {name: np.concatenate([p[name] for p in parts]) for name in ("logits", "x")}
    for name in set(parts[0]) - set(found):
        found[name] = parts[0][name]
        assert all(np.array_equal(p[name], found[name]) for p in parts)
    return found


def off(found, expected):
    """Largest error of each array, as a share of the expected one's largest magnitude."""
    errors = {}
    for name, want in expected.items():
        want = np.asarray(want)
        errors[name] = float(np.abs(found[name] - want).max() / max(np.abs(want).max(), 1e-30))
    return errors


def same(found, expected, tolerance=1e-12):
    errors = off(found, expected)
    assert max(errors.values()) <= tolerance, errors


def expected_of(kind):
    options, graph = KINDS[kind]
    x, labels = data()
    _, head = network(options)
    a = oracle.adjacency(x, graph, options["tau"], options.get("k", 0))
    weights = {n: p.detach() for n, p in head.named_parameters()}
    relu = options.get("activation") == "relu" or "variant" not in options
    found = oracle.gradients(weights, x, labels, oracle.hat(a, kind == "mean"), relu, options.get("residual", False))
    crossing = int(a.sum()) - len(x) - sum(int(a[i : i + 4, i : i + 4].sum()) - 4 for i in (0, 4, 8))
    assert crossing > 8, "the graph must cross ranks"
    return {n: t.numpy() for n, t in found.items()}


@pytest.fixture(scope="module")
def references():
    return {kind: expected_of(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def found():
    """(kind, split) -> what ranks find; of each split all kinds in one process group."""
    runs = {}

    def of(kind, split):
        if split not in runs:
            kinds = {name: ((options, *data()), {}) for name, (options, _) in KINDS.items()} | golden_jobs()
            runs[split] = dict(zip(kinds, all_over(split, list(kinds.values())), strict=True))
        return runs[split][kind]

    return of


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_ranks_give_the_gradients_of_one_with_all_rows(kind, split, references, found):
    same(found(kind, split), references[kind])


GOLDEN = GOLDENS_DIR / "ganet" / "dist_reference.npz"


def golden_jobs():
    """`share` of the reference vectors, linear and with ReLU."""
    if not GOLDEN.exists():
        return {}
    golden = Golden.load(GOLDEN, GOLDENS_DIR)
    weights = {NAMES[key]: golden.tensor(key) for key in NAMES if key in golden}
    rows = golden.tensor("X"), golden.tensor("labels")
    options = {"variant": "v1", "train": "all", "tau": golden.number("tau")}
    activations = {"golden linear": "none", "golden relu": "relu"}
    return {n: (({**options, "activation": a}, *rows), {"weights": weights}) for n, a in activations.items()}


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no {GOLDEN}")
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_any_ranks_give_the_gradients_of_the_reference_vectors(activation, split, found):
    golden = Golden.load(GOLDEN, GOLDENS_DIR)
    wanted = {"logits": "logits", "loss": "loss", "x": "dX"}
    wanted |= {name: f"d{key}" for key, name in NAMES.items() if key in golden}
    same(found(f"golden {activation}", split), {n: golden.array(f"{activation}_{k}") for n, k in wanted.items()})


@pytest.mark.parametrize("padding", [(0, 0, 0), (1, 3, 2), (0, 5, 0)], ids=str)
def test_padding_rows_change_nothing_whatever_is_in_them(padding, references):
    kinds = ["relu", "directed", "both ways"]
    jobs = [((KINDS[kind][0], *data()), {"padding": padding}) for kind in kinds]
    for kind, run in zip(kinds, all_over((6, 0, 6), jobs), strict=True):
        same(run, references[kind])


def test_a_rank_without_edges_takes_part(references):
    x, labels = data()
    x[:8, 8:], x[8:] = 0, torch.eye(2 * WIDTH, dtype=x.dtype)[8:]
    options = KINDS["relu"][0]
    a = oracle.adjacency(x, "threshold", options["tau"], 0)
    assert (a[8:].sum(1) == 1).all() and a[:8].sum() > 8, "only the last rank is without edges"
    _, head = network(options)
    weights = {n: p.detach() for n, p in head.named_parameters()}
    want = oracle.gradients(weights, x, labels, oracle.hat(a), relu=True, residual=True)
    same(over((4, 4, 4), options, x, labels), {n: t.numpy() for n, t in want.items()})


def train(rank, split, options, steps=10, rate=0.05):
    """Weights after some steps of plain gradient descent, each on rows of its own."""
    model, head = network(options)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate)
    for step in range(steps):
        x, labels = data()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))
        rows, target, valid, key = own_rows(rank, split, x[order], labels[order], 1)
        out = model(text_features=rows[:, :WIDTH], image_features=rows[:, WIDTH:], valid=valid, key=key)
        losses = cross_entropy(out.logits, target, reduction="none")[valid]
        optimizer.zero_grad()
        (len(split) / len(x) * losses.sum()).backward()
        for parameter in head.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= len(split)
        optimizer.step()
    return {n: p.detach().numpy() for n, p in head.named_parameters()}


@pytest.mark.parametrize("kind", ["relu", "both ways"])
def test_ten_steps_on_four_ranks_end_where_one_rank_ends(kind):
    options = KINDS[kind][0]
    (alone,) = in_ranks(lambda rank: train(rank, (12,), options), ranks=1)
    splits = [(3, 3, 3, 3), (5, 0, 4, 3)]
    for several in in_ranks(lambda rank: [train(rank, split, options) for split in splits], ranks=4)[0]:
        same(several, alone, 1e-10)
    start = {n: p.detach().numpy() for n, p in network(options)[1].named_parameters()}
    assert min(off(start, alone).values()) > 1e-6, "each parameter must have moved"


# ---------------------------------------------------------------------------------------- variants that are wrong

WRONG = [  # what is broken; whether the logits still come out right
    ("only own rows are differentiable", True),
    ("the backward averages over ranks", True),
    ("a graph among own rows", False),
    ("own columns as degrees", False),
    ("padding counts in the mean", True),
    ("a plain mean of own rows", True),
]


def broken(what, monkeypatch):
    """Break one thing in the package; returns (loss scale, or None as it is, and padding)."""
    if what == "only own rows are differentiable":
        monkeypatch.setattr(graph_conv, "gather_rows", own_slot)
    elif what == "the backward averages over ranks":
        monkeypatch.setattr(graph_conv, "gather_rows", averaging)
    elif what == "a graph among own rows":
        monkeypatch.setattr(ga_net_head, "threshold_graph", without_others)
    elif what == "own columns as degrees":
        monkeypatch.setattr(ga_net_head, "normalised", by_own_columns)
    elif what == "padding counts in the mean":
        return (lambda rank, split: len(split) / (sum(split) + 3)), (0, 1, 2)
    elif what == "a plain mean of own rows":
        return (lambda rank, split: 1 / split[rank]), ()
    return None, ()


def own_slot(x, counts=None, group=None):
    everyone = real_gather(x.detach(), counts, group)
    start = sum(counts[: dist.get_rank()])
    return torch.cat([everyone[:start], x, everyone[start + len(x) :]])


def averaging(x, counts=None, group=None):
    everyone = real_gather(x, counts, group)
    if everyone.requires_grad:
        everyone.register_hook(lambda gradient: gradient / dist.get_world_size())
    return everyone


def without_others(*args, **kwargs):
    graph = real_threshold(*args, **kwargs)
    start = sum(graph.counts[: dist.get_rank()])
    own = (graph.source >= start) & (graph.source < start + graph.counts[dist.get_rank()])
    kept = {name: getattr(graph, name)[own] for name in ("source", "target", "weight")}
    return dataclasses.replace(graph, **kept)


def by_own_columns(graph, *args):
    weight = torch.ones_like(graph.weight)
    into = torch.zeros(graph.counts[dist.get_rank()], dtype=weight.dtype).index_add(0, graph.target, weight)
    out_of = torch.zeros(graph.num_sources, dtype=weight.dtype).index_add(0, graph.source, weight)
    return dataclasses.replace(graph, weight=(into[graph.target] * out_of[graph.source]).rsqrt())


@pytest.mark.parametrize("what, logits_right", WRONG, ids=[w for w, _ in WRONG])
def test_a_wrong_variant_is_found_by_its_gradients(what, logits_right, references, monkeypatch):
    scale, padding = broken(what, monkeypatch)
    split = (5, 4, 3) if "mean" in what else (6, 6)
    errors = off(over(split, KINDS["relu"][0], *data(), scale=scale, padding=padding), references["relu"])
    assert (errors["logits"] < 1e-12) == logits_right
    assert max(errors.values()) > 0.05
    if what in ("only own rows are differentiable", "the backward averages over ranks"):
        assert errors["classifier.bias"] < 1e-12  # right even so: it is no evidence


# ------------------------------------------------------------------------------------------------------- traffic


def traffic(rank, rows, whole=graph_nodes.WHOLE_PRODUCTS, **options):
    """Traffic of one forward and of its backward with `rows` rows a rank, small graphs of up to `whole` products."""
    graph_nodes.WHOLE_PRODUCTS = whole
    model, _ = network({**KINDS["relu"][0], **options})
    ranks = dist.get_world_size()
    x, labels = data(rows * ranks)
    own, target, valid, key = own_rows(rank, [rows] * ranks, x, labels, 0)
    own = own.detach()  # frozen features
    with counted() as forward:
        out = model(text_features=own[:, :WIDTH], image_features=own[:, WIDTH:], valid=valid, key=key)
    with counted() as backward:
        cross_entropy(out.logits, target).backward()
    return [(dict(t.calls), dict(t.bytes)) for t in (forward, backward)], out.graph.health()["gather_bytes"]


@pytest.mark.parametrize("small_graph", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_step_costs_one_gather_of_features_masks_and_each_layers_narrower_side(ranks, small_graph):
    """Of a small graph no masks: every rank finds all of it."""
    rows, double = 4, 8
    others = (ranks - 1) * rows
    features = others * 2 * WIDTH * double
    masks = 0 if small_graph else others * -(-rows * ranks // 8)
    small = (ranks - 1) * 2 * 8  # numbers of rows and of valid ones
    whole = graph_nodes.WHOLE_PRODUCTS if small_graph else 0
    hidden, scores = others * R * double, others * CLASSES * double
    for (forward, backward), reported in in_ranks(lambda rank: traffic(rank, rows, whole), ranks=ranks):
        assert forward == (
            {"all_gather": 4 if small_graph else 5},
            {"all_gather": small + features + masks + hidden + scores},
        )
        assert backward == ({"reduce_scatter": 2}, {"reduce_scatter": hidden + scores})
        assert reported == small + features + masks + hidden + scores


def test_the_released_optimiser_needs_no_gradient_of_the_bottleneck():
    """What is frozen sends nothing back: one reduce-scatter is left, on every rank alike."""
    for (_, backward), _ in in_ranks(lambda rank: traffic(rank, 4, train="head"), ranks=2):
        assert backward[0] == {"reduce_scatter": 1}


def test_alone_nothing_is_sent():
    model, _ = network(KINDS["relu"][0])
    x, _ = data()
    with counted() as seen:
        out = model(text_features=x[:, :WIDTH], image_features=x[:, WIDTH:])
        out.logits.sum().backward()
    assert seen.total_calls == 0 and out.graph.health()["gather_bytes"] == 0
