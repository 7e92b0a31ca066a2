"""A graph over classes that refines a text classifier and shifts a cache: edges, messages, the two heads of scores."""

# C classes, R own (receiving) classes, D width, M cache rows, B batch; row vectors, x @ W

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft_ds.ops.class_relations import RELATIONS, Relation

EPS = 1e-12
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}
DEGREES = ("bipartite", "target")
FUSIONS = ("probabilities", "logits")
Totals = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ClassGraph:
    """Normalised edges of every relation that is in use.

    Attributes:
        weights: relation -> (R, C) cosines with their signs; row = receiving class, column = sending class.
        edges: relation -> (R, C) the same, normalised by the degrees of both ends.
        self_weight: relation -> (R,) coefficient of the receiver's own features.
    """

    weights: dict[str, Tensor]
    edges: dict[str, Tensor]
    self_weight: dict[str, Tensor]


def relation_weights(
    receiver_RD: Tensor, sender_CD: Tensor, diagonal: str, *, first: int = 0, topk: int | None = None
) -> Tensor:
    """Signed cosine of every pair, with the diagonal flipped, kept or removed.

    Args:
        receiver_RD: features of the receiving classes, any scale; a zero row has cosine 0 with everything.
        sender_CD: features of all sending classes.
        diagonal: `flip`, `keep` or `remove`.
        first: class of row 0, where a rank holds only some of the receivers.
        topk: of each row only so many edges of largest magnitude stay (ties: the lower class), and the diagonal.

    Returns:
        (R, C).
    """
    cosines = unit(receiver_RD) @ unit(sender_CD).T
    rows = torch.arange(len(receiver_RD), device=cosines.device)
    own = cosines[rows, first + rows]
    weights = cosines.index_put((rows, first + rows), {"flip": -own, "keep": own, "remove": 0 * own}[diagonal])
    if topk is None or topk >= weights.shape[1]:
        return weights
    largest = weights.abs().sort(dim=1, descending=True, stable=True).indices[:, :topk]
    kept = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, largest, True)
    kept[rows, first + rows] = True
    return weights.masked_fill(~kept, 0)


def class_graph(
    nodes: dict[str, Tensor],
    *,
    relations: dict[str, Relation] = RELATIONS,
    degree: str = "bipartite",
    flip: bool = True,
    topk: int | None = None,
    rows: slice | None = None,
    totals: Totals | None = None,
) -> ClassGraph:
    """All relations between three kinds of nodes, d_i = sum_j |r_ij|, normalised r_ij / sqrt((d_i + 1)(d_j + 1)).

    Args:
        nodes: `positive`, `negative`, `visual`, each (C, D) of all classes; those that no relation names may miss.
        relations: which to build.
        degree: of a sender, `bipartite`: what it sends to all receivers, the column sum; `target`: what the receiver
            of the same class gets, the row sum.
        flip: False keeps the cosine where a relation would flip its sign.
        topk: see `relation_weights`.
        rows: receivers held here, a slice of the classes; None: all.
        totals: with `rows`, (row sums (R,), column sums over own rows (C,)) -> (row sums of all classes (C,), column
            sums over all rows (C,)).

    Returns:
        constants: no gradient reaches the nodes.
    """
    if degree not in DEGREES:
        raise ValueError(f"unknown degree {degree!r}; known: {', '.join(DEGREES)}")
    rows = slice(None) if rows is None else rows
    graph = ClassGraph({}, {}, {})
    with torch.no_grad():
        for name, relation in relations.items():
            diagonal = "keep" if relation.diagonal == "flip" and not flip else relation.diagonal
            receiver, sender = nodes[relation.receiver][rows], nodes[relation.sender]
            weights = relation_weights(receiver, sender, diagonal, first=rows.start or 0, topk=topk)
            own, sent = weights.abs().sum(1), weights.abs().sum(0)
            every, sent = (own, sent) if totals is None else totals(own, sent)
            other = sent if degree == "bipartite" else every
            graph.weights[name] = weights
            graph.edges[name] = weights / ((own + 1)[:, None] * (other + 1)[None, :]).sqrt()
            graph.self_weight[name] = 1 / (own + 1)
    return graph


@dataclass(frozen=True)
class Products:
    """Parts of the layer that do not depend on its weights: sums over edges of frozen features, computed once.

    Attributes:
        negative, positive: (R, D) nodes before the layer; `negative` is None where nobody reads it.
        sums: relation -> (R, D): self weight times the receiver plus edges times the sender (for `vv` no self part);
            of `np` the self part alone, since its senders are the negatives that the layer has updated.
        edges_np: (R, C) edges to those.
    """

    negative: Tensor | None
    positive: Tensor
    sums: dict[str, Tensor]
    edges_np: Tensor | None


def products(nodes: dict[str, Tensor], *, relations: dict[str, Relation] = RELATIONS, **options: Any) -> Products:
    """Sum over edges once and for all. Arguments as in `class_graph`; one relation is in memory at a time."""
    rows = options.get("rows") or slice(None)
    sums: dict[str, Tensor] = {}
    edges_np = None
    with torch.no_grad():
        for name, relation in relations.items():
            graph = class_graph(nodes, relations={name: relation}, **options)
            own = graph.self_weight[name][:, None] * nodes[relation.receiver][rows]
            if name == "np":
                sums[name], edges_np = own, graph.edges[name]
                continue
            sent = graph.edges[name] @ nodes[relation.sender]
            sums[name] = sent if name == "vv" else own + sent
    negative = nodes["negative"][rows] if "np" in sums else None
    return Products(negative, nodes["positive"][rows], sums, edges_np)


@dataclass(frozen=True)
class Refined:
    """Result of one round of messages.

    Attributes:
        negative: (R, D) updated negated texts; None where nothing reads them.
        text: (R, D) updated texts, the classifier, not normalised.
        shift: (R, D) message of each class to its cache rows, before gamma; None without the relation.
        messages: relation -> (R, D).
    """

    negative: Tensor | None
    text: Tensor
    shift: Tensor | None
    messages: dict[str, Tensor] = field(default_factory=dict)


def refine(
    fixed: Products,
    weights: dict[str, Tensor],
    coefficients: dict[str, Tensor | float],
    activation: str = "tanh",
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Refined:
    """One round: negated texts first, then texts, which read the updated ones, and the shift of the cache.

    Args:
        fixed: see `products`; relations that are not in it send nothing.
        weights: `negative`, `positive`, `visual` -> (D, D), by what receives; those in use.
        coefficients: relation -> factor of its message.
        activation: `tanh`, `relu` or `identity`.
        gather: own rows of the updated negated texts (R, D) -> all of them (C, D), where `fixed` holds some rows.

    Returns:
        with gradients to `weights` and `coefficients`.

    Source: equations 1 to 6 of the paper, as its re-implementation states them.
    """
    act = ACTIVATIONS[activation]
    messages: dict[str, Tensor] = {}

    def send(name: str, summed: Tensor, weight: Tensor) -> Tensor:
        messages[name] = act(summed @ weight)
        return coefficients[name] * messages[name]

    negative = fixed.negative
    for name in ("pn", "vn"):
        if negative is not None and name in fixed.sums:
            negative = negative + send(name, fixed.sums[name], weights["negative"])
    text = fixed.positive
    for name in ("pp", "vp"):
        if name in fixed.sums:
            text = text + send(name, fixed.sums[name], weights["positive"])
    if negative is not None:
        senders = negative if gather is None else gather(negative)
        text = text + send("np", fixed.sums["np"] + fixed.edges_np @ senders, weights["positive"])
    if "vv" in fixed.sums:
        messages["vv"] = act(fixed.sums["vv"] @ weights["visual"])
    return Refined(negative, text, messages.get("vv"), messages)


def shifted_cache(cache_MD: Tensor, labels_M: Tensor, shift_CD: Tensor | None, gamma: Tensor | float) -> Tensor:
    """(M, D) cache rows moved with their class: X_i + gamma * shift of its label."""
    return cache_MD if shift_CD is None else cache_MD + gamma * shift_CD[labels_M]


def text_logits(z_BD: Tensor, text_CD: Tensor, scale: float) -> Tensor:
    """(B, C) scaled cosines, equation 7."""
    return scale * (unit(z_BD) @ unit(text_CD).T)


def affinity(z_BD: Tensor, cache_MD: Tensor, labels_M: Tensor, num_classes: int) -> Tensor:
    """(B, C) sums over the cache rows of a class of exp(cosine - 1), equation 8; 0 for a class without rows."""
    near = (unit(z_BD) @ unit(cache_MD).T - 1).exp()
    return near.new_zeros(len(near), num_classes).index_add(1, labels_M, near)


def fuse(text_BC: Tensor, visual_BC: Tensor, fusion: float, rule: str = "probabilities") -> Tensor:
    """(B, C) log probabilities of both heads together, equation 9.

    Args:
        fusion: w, weight of the visual head.
        rule: `probabilities`: of (softmax(text) + w softmax(visual)) / (1 + w); `logits`: of softmax(text + w visual).
    """
    if rule == "logits":
        return (text_BC + fusion * visual_BC).log_softmax(1)
    if rule != "probabilities":
        raise ValueError(f"unknown fusion rule {rule!r}; known: probabilities, logits")
    text = text_BC.log_softmax(1)
    if fusion == 0:
        return text
    w = torch.tensor(fusion, dtype=text.dtype, device="cpu")  # a number to a GPU, which gets no copy of it
    return torch.logaddexp(text, visual_BC.log_softmax(1) + w.log()) - (1 + w).log()


def classify(exported: dict[str, Tensor], z_BD: Tensor) -> Tensor:
    """Log probabilities (B, C) by what `HeGraphHead.export` gave: no graph, no weights.

    Args:
        exported: `text` (C, D), `cache` (M, D), `labels` (M,), and scalars `tau`, `visual_scale`, `fusion`,
            `mean_over_rows`, `fuse_logits`.
        z_BD: image features, not normalised.
    """
    text, labels = exported["text"], exported["labels"]
    z = z_BD.to(text.dtype)
    near = affinity(z, exported["cache"], labels, len(text))
    if exported["mean_over_rows"]:
        near = near / rows_of_class(labels, len(text)).to(near.dtype)
    visual = exported["visual_scale"] * near
    rule = "logits" if exported["fuse_logits"] else "probabilities"
    return fuse(text_logits(z, text, exported["tau"]), visual, float(exported["fusion"]), rule)


def rows_of_class(labels_M: Tensor, num_classes: int) -> Tensor:
    """(C,) int64 cache rows of each class, at least 1, to divide by."""
    return torch.bincount(labels_M, minlength=num_classes).clamp(min=1)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero."""
    return F.normalize(x, dim=-1, eps=EPS)
