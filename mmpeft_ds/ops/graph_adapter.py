"""GraphAdapter's two class graphs, in the form that takes only the query's row of each.

A graph of the paper has n + 1 nodes: the text of one query class, and the rows of a bank (texts or images) of one
group of classes. Only the query's node is read, so only its row of the normalised adjacency is needed.
"""

# C classes, G groups, n = C / G classes of a group, D feature width, Q queries

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def groups_of(num_classes: int, groups: int) -> int:
    """`groups`, or 1 where the classes cannot be divided evenly."""
    return groups if num_classes % groups == 0 else 1


def cosine(x_QD: Tensor, y_CD: Tensor) -> Tensor:
    """(Q, C) cosines, 0 for a row of zeros; without gradient."""
    with torch.no_grad():
        return normalize(x_QD, dim=1, eps=1e-12) @ normalize(y_CD, dim=1, eps=1e-12).T


def aggregated(text_CD: Tensor, bank_CD: Tensor, groups: int) -> Tensor:
    """The message to the node of each query class in the graph of each group, (C, G, D).

    Class j belongs to group j mod G. Every diagonal of a graph is 2, cosine and identity; degrees are row sums.

    Args:
        text_CD: text of each class, not of unit length.
        bank_CD: what the classes of the groups are represented by: the texts again, or image prototypes.
        groups: must divide C.

    Source: GraphAdapter, arXiv 2309.13625, released code (`baseclip_graph_v1.py`), restated.
    """
    classes, width = text_CD.shape
    of_group = (classes // groups, groups)
    edge_CC, around_CC = (cosine(x, bank_CD).clamp(min=0) for x in (text_CD, bank_CD))
    degree_CG = 2 + edge_CC.view(classes, *of_group).sum(1)
    inside_C = around_CC.view(*of_group, *of_group).diagonal(dim1=1, dim2=3).sum(1).reshape(classes)
    # A class of the bank has its edges inside the group, one to the query, and the identity.
    neighbour_CC = edge_CC + inside_C + 1
    weight_CnG = (edge_CC / neighbour_CC.sqrt()).view(classes, *of_group) / degree_CG.sqrt()[:, None]
    messages = torch.einsum("qng,ngd->qgd", weight_CnG, bank_CD.view(*of_group, width))
    return (2 / degree_CG)[..., None] * text_CD[:, None] + messages


def query_graphs(text_CD: Tensor, bank_CD: Tensor, groups: int, group: int) -> tuple[Tensor, Tensor]:
    """The graphs of one group as the paper draws them: cosines, and the normalised adjacency, (C, n+1, n+1) each.

    Node 0 is the query class. Cosines below 0 are no edges; the identity is added before the normalisation. Made to be
    looked at: it holds C n^2 numbers, which `aggregated` never does.
    """
    members = bank_CD[group::groups]
    nodes = 1 + len(members)
    raw = text_CD.new_ones(len(text_CD), nodes, nodes)
    raw[:, 0, 1:] = raw[:, 1:, 0] = cosine(text_CD, members)
    raw[:, 1:, 1:] = cosine(members, members)
    looped = raw.clamp(min=0) + torch.eye(nodes, dtype=raw.dtype, device=raw.device)
    scale = looped.sum(2).rsqrt()
    return raw, scale[:, :, None] * looped * scale[:, None]


def refined(
    text_CD: Tensor,
    from_text_CGD: Tensor,
    from_image_CGD: Tensor,
    weight_text_DD: Tensor,
    weight_image_DD: Tensor,
    bias_text_CD: Tensor,
    bias_image_CD: Tensor,
    alpha: float,
    beta: float,
) -> Tensor:
    """The class texts moved by what their nodes receive, (C, D).

    beta * text + (1 - beta) * mean over groups of (alpha * from texts + (1 - alpha) * from images), each of which is
    tanh(received @ weight + bias of the query class).

    Source: as `aggregated`.
    """
    from_text = torch.tanh(from_text_CGD @ weight_text_DD + bias_text_CD[:, None])
    from_image = torch.tanh(from_image_CGD @ weight_image_DD + bias_image_CD[:, None])
    return beta * text_CD + (1 - beta) * (alpha * from_text + (1 - alpha) * from_image).mean(1)
