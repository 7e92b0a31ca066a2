"""HeGraphAdapter over ranks: replicated, with cache rows or classes shared out, it is one rank with everything.

Losses, logits and every gradient agree in float64 to 1e-12, for uneven and empty shares and batches.
"""

import numpy as np
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds import HeGraphConfig
from mmpeft_ds.backbones.features.backbone import FeatureConfig, FeatureModel
from mmpeft_ds.distributed import collectives, shards, support
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.methods.hegraph import head as head_module
from mmpeft_ds.methods.hegraph.standalone import HeGraphHead
from mmpeft_ds.ops import class_graph as ops
from mmpeft_ds.ops.class_graph import classify
from mmpeft_ds.sites.feature_site import Bank, Features, Labelled
from tests.helpers.forked_ranks import in_ranks

C, D, ROWS = 5, 6, 7
WEIGHTS = ("W_n", "W_p", "W_v", "factors")
# rows of the batch, cache rows and classes of each rank
SPLITS = {
    1: ([7], [11], [5]),
    2: ([5, 2], [4, 7], [3, 2]),
    4: ([3, 0, 1, 3], [6, 0, 1, 4], [2, 1, 0, 2]),
}
OPTIONS = [
    {},
    {"degree": "target", "cache_reduce": "mean", "learned": True, "topk": 2},
]


def everything():
    g = torch.Generator().manual_seed(3)
    pos, neg, vis = (torch.randn(C, D, generator=g, dtype=torch.float64) for _ in range(3))
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 4])
    cache = torch.randn(len(labels), D, generator=g, dtype=torch.float64)
    z = torch.randn(ROWS, D, generator=g, dtype=torch.float64)
    return pos, neg, vis, cache, labels, z, torch.tensor([0, 4, 3, 1, 2, 2, 0])


def part(sizes, rank):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def make(shard, rank, ranks, options):
    """The head with what this rank holds, and this rank's rows."""
    pos, neg, vis, cache, labels, z, y = everything()
    batches, caches, classes = (part(sizes, rank) for sizes in SPLITS[ranks])
    if shard == "cache":
        cache, labels = cache[caches], labels[caches]
    if shard == "classes":
        mine = (labels >= classes.start) & (labels < classes.stop)
        pos, neg, vis, cache, labels = pos[classes], neg[classes], vis[classes], cache[mine], labels[mine]
    torch.manual_seed(0)
    head = HeGraphHead(pos, neg, vis, cache, labels, tau=3.0, shard=shard, **options)
    return head, z[batches], y[batches]


def gradients(head):
    return {n: p.grad.clone().numpy() for n in WEIGHTS if (p := getattr(head, n)) is not None}


def steps(head, z, y):
    """Logits, losses and gradients, by gathered logits and by the loss that never gathers them; then evaluation."""
    found = {}
    text, visual = head(z)
    loss = (cross_entropy(text, y, reduction="none") + 0.1 * cross_entropy(visual, y, reduction="none")).sum() / ROWS
    loss.backward()
    found["text"], found["visual"] = text.detach().numpy(), visual.detach().numpy()
    found["loss"], found["grads"] = loss.item(), gradients(head)
    head.zero_grad()
    loss = head.losses(z, y).sum() / ROWS
    loss.backward()
    found["loss_again"], found["grads_again"] = loss.item(), gradients(head)
    head.eval()
    with torch.no_grad():
        found["prob"] = head.predict(z).numpy()
        found["exported"] = classify(head.export(), z).exp().numpy()
    return found


def on_rank(rank, ranks):
    found = {}
    for shard in ("none", "cache", "classes"):
        for i, options in enumerate(OPTIONS):
            found[shard, i] = steps(*make(shard, rank, ranks, options))
    return found


def expected(options):
    pos, neg, vis, cache, labels, z, y = everything()
    torch.manual_seed(0)
    return steps(HeGraphHead(pos, neg, vis, cache, labels, tau=3.0, **options), z, y)


def same(found, want):
    close = {"atol": 1e-12, "rtol": 0}
    for key in ("text", "visual", "prob", "exported"):
        np.testing.assert_allclose(np.concatenate([f[key] for f in found]), want[key], err_msg=key, **close)
    for key in ("loss", "loss_again"):
        np.testing.assert_allclose(sum(f[key] for f in found), want["loss"], err_msg=key, **close)
    for key in ("grads", "grads_again"):
        for name, gradient in want["grads"].items():
            assert np.abs(gradient).max() > 1e-6, name
            np.testing.assert_allclose(sum(f[key][name] for f in found), gradient, err_msg=f"{key} {name}", **close)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_are_one_rank_with_everything(ranks):
    everywhere = in_ranks(on_rank, ranks, ranks=ranks)
    for i, options in enumerate(OPTIONS):
        want = expected(options)
        for shard in ("none", "cache", "classes"):
            same([found[shard, i] for found in everywhere], want)


def method(rank, ranks, shard):
    """The same through a model of features and peft: every rank has the whole bank, and works on its part."""
    pos, neg, _, cache, labels, z, y = everything()
    bank = Bank(C, pos[:, None], neg[:, None], cache[:, None], labels)
    model = FeatureModel(FeatureConfig(image_width=D, num_classes=C, logit_scale=3.0), bank)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, HeGraphConfig(shard=shard)).train()
    mine = part(SPLITS[ranks][0], rank)
    out = model(image_features=z[mine])
    loss = sum(weight * cross_entropy(x, y[mine], reduction="none") for weight, x in out.terms).sum() / ROWS
    loss.backward()
    return out.logits.detach().numpy(), loss.item(), gradients(head_of(model))


def searched(rank, ranks, shard):
    pos, neg, _, cache, labels, _, _ = everything()
    bank = Bank(C, pos[:, None], neg[:, None], cache[:, None], labels)
    model = FeatureModel(FeatureConfig(image_width=D, num_classes=C, logit_scale=3.0), bank)
    torch.manual_seed(0)
    z = torch.randn(60, D, dtype=torch.float64)
    head = head_of(peft.get_peft_model(model, HeGraphConfig(shard=shard, search=True)))
    y = (ops.unit(z) @ ops.unit(pos).T).argmax(1)  # as if the texts alone were right
    given = Labelled(Features(z, None, torch.ones(60, dtype=torch.bool), torch.arange(60)), y)
    return head.calibrate(given, given), head.searched.tolist()


def test_a_search_finds_the_same_on_all_ranks_however_work_is_shared():
    want = searched(0, 1, "none")
    assert want[1][0] == 0 and want[1][3] == 0, "neither negated texts nor the cache help"
    for shard in ("none", "cache", "classes"):
        assert in_ranks(searched, 2, shard) == [want, want]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_method_shares_its_bank_out_and_is_still_one_rank(ranks):
    logits, loss, grads = method(0, 1, "none")
    for shard in ("cache", "classes"):
        found = in_ranks(method, ranks, shard, ranks=ranks)
        np.testing.assert_allclose(np.concatenate([f[0] for f in found]), logits, atol=1e-12, rtol=0)
        assert sum(f[1] for f in found) == pytest.approx(loss, abs=1e-12)
        for name, gradient in grads.items():
            np.testing.assert_allclose(sum(f[2][name] for f in found), gradient, atol=1e-12, rtol=0)


# --------------------------------------------------------------------------- negative controls: wrong gradients show


class OwnGradient(torch.autograd.Function):
    """The sum over ranks, whose gradient stays with the rank that owns the row."""

    @staticmethod
    def forward(ctx, x, counts, group):
        ctx.counts, ctx.rank = counts, collectives.rank(group)
        return shards.all_reduced(x.clone(), group=group).split(counts)[ctx.rank].clone()

    @staticmethod
    def backward(ctx, grad):
        found = grad.new_zeros(sum(ctx.counts), *grad.shape[1:])
        found[part(ctx.counts, ctx.rank)] = grad
        return found, None, None


class AveragedGradient(shards._SumToOwner):
    """The right gradient divided by the ranks, as if each held all of it."""

    @staticmethod
    def backward(ctx, grad):
        return shards._SumToOwner.backward(ctx, grad)[0] / len(ctx.counts), None, None


def gather_without_reduction(x, counts=None, group=None):
    """All rows, whose gradient comes from this rank's use of its own rows alone."""
    if not x.requires_grad:
        return shards.gather_rows(x, counts, group)
    everyone = list(shards.gather_rows(x.detach(), counts, group).split(counts))
    everyone[collectives.rank(group)] = x
    return torch.cat(everyone)


WRONG = {
    "own": ("cache", "sum_to_owner", OwnGradient.apply),
    "averaged": ("cache", "sum_to_owner", AveragedGradient.apply),
    "unreduced": ("classes", "gather_rows", gather_without_reduction),
}


def wrongly(rank, which):
    shard, name, function = WRONG[which]
    setattr(head_module, name, function)  # this process is a fork and ends afterwards
    return steps(*make(shard, rank, 2, {}))


@pytest.mark.parametrize("which", sorted(WRONG))
def test_a_wrong_reduction_gives_right_logits_and_is_found(which):
    found, want = in_ranks(wrongly, which), expected({})
    np.testing.assert_allclose(np.concatenate([f["text"] for f in found]), want["text"], atol=1e-12)
    np.testing.assert_allclose(np.concatenate([f["visual"] for f in found]), want["visual"], atol=1e-12)
    with pytest.raises(AssertionError, match="grads"):
        same(found, want)


def averaged_each(rank):
    head, z, y = make("none", rank, 2, {})
    head.losses(z, y).mean().backward()
    return gradients(head)


def test_a_mean_of_means_over_uneven_ranks_is_found():
    found, want = in_ranks(averaged_each), expected({})["grads"]
    assert all(np.abs(sum(f[n] for f in found) / 2 - g).max() > 1e-6 for n, g in want.items())


# ------------------------------------------------------------------------------------------------ setup over ranks


def set_up(rank, ranks):
    g = torch.Generator().manual_seed(5)
    features = torch.randn(9, 4, 3, generator=g, dtype=torch.float64)
    labels, ids = torch.tensor([2, 0, 2, 1, 0, 2, 4, 4, 0]), torch.tensor([70, 20, 10, 30, 5, 60, 8, 7, 90])
    order = torch.randperm(9, generator=g)
    sizes = {1: [9], 2: [9, 0], 3: [2, 0, 7]}[ranks]
    own = order[part(sizes, rank)]
    means, counts = support.class_means(features[own, 0], labels[own], 5)
    got = support.gather_support(features[own], labels[own], ids[own])
    return means.numpy(), counts.numpy(), *(part.numpy() for part in got)


def test_support_and_class_means_do_not_depend_on_who_held_the_samples():
    alone = set_up(0, 1)
    np.testing.assert_array_equal(alone[1], [3, 1, 3, 0, 2])
    assert (alone[0][3] == 0).all()
    np.testing.assert_array_equal(alone[4], [5, 20, 90, 30, 10, 60, 70, 7, 8])
    for ranks in (2, 3):
        for found in in_ranks(set_up, ranks, ranks=ranks):
            np.testing.assert_allclose(found[0], alone[0], atol=1e-15)
            for a, b in zip(found[1:], alone[1:], strict=True):
                np.testing.assert_array_equal(a, b)


def disagree(rank, how):
    head, z, y = make("none", rank, 2, {})
    if how == "bit" and rank == 1:
        head.cache[3, 2] = torch.nextafter(head.cache[3, 2], torch.tensor(9.0, dtype=torch.float64))
    if how == "order" and rank == 1:
        head.positive[:2] = head.positive[:2].flip(0).clone()
    try:
        head(z)
    except BadInput as problem:
        return str(problem)
    return None


@pytest.mark.parametrize("how", ["same", "bit", "order"])
def test_ranks_with_other_features_are_refused_on_all_ranks(how):
    told = in_ranks(disagree, how)
    assert all(("different values" in t and "\n" not in t) if how != "same" else t is None for t in told), told


def test_the_checksum_sees_bits_shapes_and_order(monkeypatch):
    x = torch.randn(6, 5)
    other = [x.T, x.flip(0), -x, x[:5], torch.cat([x, x[:1]]), x.double(), x.view(5, 6)]
    for piece in (4, 1000):
        monkeypatch.setattr(support, "PIECE", piece)
        sums = [support.checksum([y]) for y in (x, *other)]
        assert len(set(sums)) == len(sums) and all(-(2**63) <= s < 2**63 for s in sums)
        assert support.checksum([x.clone()]) == sums[0] != support.checksum([x, x[:0]])


def misplaced(rank):
    pos, neg, vis, cache, labels, z, _ = everything()
    classes = part([3, 2], rank)
    head = HeGraphHead(pos[classes], neg[classes], vis[classes], cache, labels, tau=3.0, shard="classes")
    with pytest.raises(BadInput, match="own classes"):
        head(z)


def test_cache_rows_of_other_ranks_classes_are_refused():
    in_ranks(misplaced)
