"""The class graph: signs and diagonals, degrees, row blocks, top-k, torch_geometric's view of it, the two heads."""

import pytest
import torch
from torch.nn.functional import one_hot
from torch_geometric.nn import MessagePassing

from mmpeft_ds.ops import class_graph as ops
from mmpeft_ds.ops import class_relations
from mmpeft_ds.ops.class_graph_data import hetero_data

C, D = 6, 5


def nodes(seed=0, classes=C):
    g = torch.Generator().manual_seed(seed)
    return {
        kind: 3 * torch.randn(classes, D, generator=g, dtype=torch.float64)
        for kind in ("positive", "negative", "visual")
    }


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


def test_off_the_diagonal_all_relations_are_signed_cosines():
    x = nodes()
    off = ~torch.eye(C, dtype=torch.bool)
    for name, weights in ops.class_graph(x).weights.items():
        relation = class_relations.RELATIONS[name]
        same(weights[off], cosine(x[relation.receiver], x[relation.sender])[off])
        assert (weights[off] < 0).any(), "the draw shows no sign"


@pytest.mark.parametrize(("name", "sign"), [("pn", -1), ("vn", -1), ("np", -1), ("vp", 1), ("pp", 0), ("vv", 0)])
def test_the_edge_of_a_class_to_itself_is_flipped_kept_or_removed(name, sign):
    x, relation = nodes(), class_relations.RELATIONS[name]
    own = cosine(x[relation.receiver], x[relation.sender]).diagonal()
    same(ops.class_graph(x).weights[name].diagonal(), sign * own)
    same(ops.class_graph(x, flip=False).weights[name].diagonal(), abs(sign) * own)


@pytest.mark.parametrize("kind", ["positive", "negative", "visual"])
def test_the_length_of_a_row_does_not_matter(kind):
    x = nodes()
    before = ops.class_graph(x)
    x[kind][2] *= 7.5
    for name, weights in ops.class_graph(x).weights.items():
        same(weights, before.weights[name])


def test_edges_are_divided_by_the_degrees_of_both_ends():
    x = nodes()
    for degree in ops.DEGREES:
        graph = ops.class_graph(x, degree=degree)
        for name, r in graph.weights.items():
            for i in range(C):
                d_i = r[i].abs().sum()
                same(graph.self_weight[name][i], 1 / (d_i + 1))
                for j in range(C):
                    d_j = (r[:, j] if degree == "bipartite" else r[j]).abs().sum()
                    same(graph.edges[name][i, j], r[i, j] / ((d_i + 1) * (d_j + 1)).sqrt())


def test_between_nodes_of_one_kind_edges_are_symmetric_and_both_degree_rules_agree():
    bipartite, target = (ops.class_graph(nodes(), degree=degree).edges for degree in ops.DEGREES)
    for name in ("pp", "vv"):
        same(bipartite[name], bipartite[name].T)
        assert (bipartite[name].diagonal() == 0).all()
        same(bipartite[name], target[name])
    assert (bipartite["pn"] - target["pn"]).abs().max() > 1e-3


def test_topk_keeps_the_largest_magnitudes_and_the_diagonal():
    x = nodes()
    every = ops.relation_weights(x["positive"], x["visual"], "flip")
    few = ops.relation_weights(x["positive"], x["visual"], "flip", topk=2)
    for i in range(C):
        best = set(every[i].abs().argsort(descending=True)[:2].tolist()) | {i}
        assert set(few[i].nonzero()[:, 0].tolist()) == best
        assert torch.equal(few[i][list(best)], every[i][list(best)])
    assert torch.equal(ops.relation_weights(x["positive"], x["visual"], "flip", topk=C), every)


def test_equal_magnitudes_keep_the_lower_class():
    sender = torch.ones(5, 2, dtype=torch.float64)
    r = ops.relation_weights(sender, sender, "keep", topk=2)
    assert [row.nonzero()[:, 0].tolist() for row in r] == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4]]


@pytest.mark.parametrize("degree", ops.DEGREES)
def test_row_blocks_are_rows_of_the_whole_graph(degree):
    x = nodes()
    whole, fixed = ops.class_graph(x, degree=degree, topk=3), ops.products(x, degree=degree, topk=3)
    for rows in (slice(0, 2), slice(2, 2), slice(2, 6)):
        for name in class_relations.RELATIONS:
            r = whole.weights[name].abs()
            options = {
                "degree": degree,
                "topk": 3,
                "rows": rows,
                "totals": lambda own, sent, r=r: (r.sum(1), r.sum(0)),
            }
            relation = {name: class_relations.RELATIONS[name]}
            same(ops.class_graph(x, relations=relation, **options).edges[name], whole.edges[name][rows])
            same(ops.products(x, relations=relation, **options).sums[name], fixed.sums[name][rows])


def weights(seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(D, D, generator=g, dtype=torch.float64).requires_grad_()
        for k in ("negative", "positive", "visual")
    }


def literal(x, w, coefficients, act):
    """The layer as the equations stand, without sums made beforehand."""
    graph = ops.class_graph(x)

    def message(name, receiver, sender, weight, own=True):
        self_part = graph.self_weight[name].diag() @ receiver if own else 0
        return act((self_part + graph.edges[name] @ sender) @ weight)

    p, n, v = x["positive"], x["negative"], x["visual"]
    c = coefficients
    n = n + c["pn"] * message("pn", n, p, w["negative"]) + c["vn"] * message("vn", n, v, w["negative"])
    sent = [message(*a, w["positive"]) for a in (("pp", p, p), ("vp", p, v), ("np", p, n))]
    text = p + c["pp"] * sent[0] + c["vp"] * sent[1] + c["np"] * sent[2]
    return n, text, message("vv", v, v, w["visual"], own=False)


@pytest.mark.parametrize("act", list(ops.ACTIVATIONS))
def test_sums_made_beforehand_change_no_number_and_no_gradient(act):
    x, w = nodes(), weights()
    coefficients = class_relations.Coefficients().of_relations(training=True)
    found = ops.refine(ops.products(x), w, coefficients, act)
    want = literal(x, w, coefficients, ops.ACTIVATIONS[act])
    probe = [torch.randn(C, D, dtype=torch.float64) for _ in want]
    results = []
    for outs in ((found.negative, found.text, found.shift), want):
        total = sum((o * p).sum() for o, p in zip(outs, probe, strict=True))
        results.append((outs, torch.autograd.grad(total, list(w.values()))))
    for a, b in zip(*(outs for outs, _ in results), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    for a, b in zip(*(grads for _, grads in results), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_without_a_relation_the_layer_is_that_of_coefficient_zero():
    x, w = nodes(), weights()
    for name in class_relations.RELATIONS:
        kept = class_relations.in_use((name,))
        given = class_relations.Coefficients().of_relations(True)
        found = ops.refine(ops.products(x, relations=kept), w, given)
        want = ops.refine(ops.products(x), w, given | {name: 0.0})
        same(found.text, want.text)
        assert (found.shift is None) == (name == "vv")
    assert list(class_relations.in_use(("np",))) == ["pp", "vp", "vv"], "nobody reads the negated texts"


# ------------------------------------------------------------------------------------------- torch_geometric


class Weighted(MessagePassing):
    """Adds up what the senders of a relation have, times the weight of the edge."""

    def __init__(self):
        super().__init__(aggr="add")

    def forward(self, sender, receiver, edges):
        size = (len(sender), len(receiver))
        return self.propagate(edges.edge_index, x=(sender, receiver), edge_weight=edges.edge_weight, size=size)

    def message(self, x_j, edge_weight):
        return edge_weight[:, None] * x_j


def sparse_layer(data, name, x, weight, own=True):
    relation = class_relations.RELATIONS[name]
    edges = data[relation.sender, name, relation.receiver]
    summed = Weighted()(x[relation.sender], x[relation.receiver], edges)
    if own:
        summed = summed + data[relation.receiver][f"self_weight_{name}"][:, None] * x[relation.receiver]
    return torch.tanh(summed @ weight)


@pytest.mark.parametrize("topk", [None, 2])
def test_message_passing_over_the_exported_edges_equals_the_dense_layer(topk):
    x, w, c = nodes(), weights(), class_relations.Coefficients().of_relations(True)
    data = hetero_data(ops.class_graph(x, topk=topk), x)
    data.validate()
    dense = ops.refine(ops.products(x, topk=topk), w, c)
    sent = {name: sparse_layer(data, name, x, w["negative"]) for name in ("pn", "vn")}
    updated = x | {"negative": x["negative"] + c["pn"] * sent["pn"] + c["vn"] * sent["vn"]}
    sent |= {name: sparse_layer(data, name, updated, w["positive"]) for name in ("pp", "vp", "np")}
    sent["vv"] = sparse_layer(data, "vv", x, w["visual"], own=False)
    for name, message in dense.messages.items():
        torch.testing.assert_close(sent[name], message, atol=1e-12, rtol=0)
    text = x["positive"] + sum(c[name] * sent[name] for name in ("pp", "vp", "np"))
    torch.testing.assert_close(text, dense.text, atol=1e-12, rtol=0)
    assert data["positive", "pp", "positive"].edge_index.shape[1] <= C * (C - 1)
    assert all(store.is_edge_attr(key) or key == "edge_index" for store in data.edge_stores for key in store)
    assert data["positive"].is_node_attr("self_weight_pp")
    assert torch.equal(data["visual"].x, x["visual"])


# ------------------------------------------------------------------------------------------------- odd inputs, heads


def test_one_class_and_a_class_without_images_stay_finite():
    for x in (nodes(classes=1), nodes()):
        x["visual"][0] = 0
        w = weights()
        found = ops.refine(ops.products(x), w, class_relations.Coefficients().of_relations(True))
        (found.text.sum() + found.shift.sum()).backward()
        for tensor in (found.text, found.shift, *(p.grad for p in w.values())):
            assert tensor.isfinite().all()
        assert (ops.class_graph(x).weights["vp"][:, 0] == 0).all()


def test_affinity_is_the_sum_over_the_rows_of_a_class():
    g = torch.Generator().manual_seed(2)
    z, cache = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (3, 7))
    labels = torch.tensor([3, 0, 0, 5, 3, 3, 1])
    want = (cosine(z, cache) - 1).exp() @ one_hot(labels, C).double()
    torch.testing.assert_close(ops.affinity(z, cache, labels, C), want)
    assert (ops.affinity(z, cache, labels, C)[:, [2, 4]] == 0).all()


def test_fusion_is_the_mean_of_two_softmaxes_also_where_they_underflow():
    text, visual = torch.randn(4, C, dtype=torch.float64) * 5, torch.randn(4, C, dtype=torch.float64) * 5
    for w in (0.0, 0.5, 1.0):
        want = (text.softmax(1) + w * visual.softmax(1)) / (1 + w)
        torch.testing.assert_close(ops.fuse(text, visual, w).exp(), want)
    torch.testing.assert_close(ops.fuse(text, visual, 0.5, "logits").exp(), (text + 0.5 * visual).softmax(1))
    far = ops.fuse(text * 1000, visual * 1000, 1.0)
    assert far.isfinite().all()


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="degree"):
        ops.class_graph(nodes(), degree="row")
    with pytest.raises(ValueError, match="fusion rule"):
        ops.fuse(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, "max")
