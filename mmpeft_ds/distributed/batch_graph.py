"""Graph over the samples of all ranks: edges from every sample to those of this rank.

Building it is collective: all ranks of the group call with the same options, whatever rows they hold, also none.
"""

# B rows of this rank, M rows of all ranks in rank order, V valid ones among them, E edges, k neighbours, N ranks

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.counters import Traffic, counted
from mmpeft_ds.distributed.gather import exchange_rows, gather_rows
from mmpeft_ds.distributed.graph_nodes import Nodes
from mmpeft_ds.ops.graph_topk import Nearest, best_of, nearest, settled, shared_candidates
from mmpeft_ds.ops.similarity_graph import decide_pairs, edges_above, symmetric_degrees, symmetric_edges

DIRECTIONS = ("to_neighbour", "from_neighbour")
EXCHANGES = ("gather", "ring")
NORMALISATIONS = ("none", "symmetric", "mean")


@dataclass
class Graph:
    """Edges into the samples of this rank, of a graph over those of all ranks.

    Attributes:
        source: (E,) int64, position in [0, M) among the rows of all ranks.
        target: (E,) int64, own row in [0, B). Edges are sorted by target, then by source; one that occurs twice counts
            twice.
        weight: (E,) float64; 1 until `normalised`.
        counts: rows of every rank; their sum is M.
        valid: (B,) bool; what is not valid has no edge, not even to itself.
        in_degree: (B,) int64, edges into own rows, self-loops counted.
        out_degree: (M,) int64, edges out of all rows.
        group: the ranks that share it.
        exchange: `gather` or `ring`: how a convolution on it gets the other ranks' rows.
        traffic: collectives of building it and of the forward passes of convolutions on it.
        repeated: whether an edge may occur twice.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    counts: list[int]
    valid: Tensor
    in_degree: Tensor
    out_degree: Tensor
    group: Any = None
    exchange: str = "gather"
    traffic: Traffic = field(default_factory=Traffic)
    repeated: bool = True
    _adjacency: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_sources(self) -> int:
        """M."""
        return sum(self.counts)

    @property
    def num_targets(self) -> int:
        """B."""
        return len(self.valid)

    @property
    def offset(self) -> int:
        """Position of the first own row among all."""
        return sum(self.counts[: collectives.rank(self.group)])

    @property
    def edge_index(self) -> Tensor:
        """(2, E) as torch_geometric has it: sources in [0, M), targets in [0, B)."""
        return torch.stack([self.source, self.target])

    def adjacency(self, dtype: torch.dtype, rank: int | None = None) -> Tensor:
        """Weighted sparse CSR matrix, row = target, column = source; made once and kept.

        Args:
            dtype: of its values.
            rank: columns of that rank's rows alone, (B, counts[rank]); None: of all, (B, M).
        """
        if (dtype, rank) not in self._adjacency:
            source, target, weight, columns = self.source, self.target, self.weight, self.num_sources
            if rank is not None:
                first, columns = sum(self.counts[:rank]), self.counts[rank]
                here = ((source >= first) & (source < first + columns)).nonzero()[:, 0]  # waits for their number
                source, target, weight = source[here] - first, target[here], weight[here]
            if self.repeated:  # a sparse matrix has no entry twice
                codes = target * max(1, columns) + source
                codes, entry = torch.unique_consecutive(codes, return_inverse=True)
                target, source = codes // max(1, columns), codes % max(1, columns)
                weight = weight.new_zeros(len(codes)).index_add_(0, entry, weight)
            ends = _occurrences(target, self.num_targets).cumsum(0)
            rows = torch.cat([ends.new_zeros(1), ends])
            size = (self.num_targets, columns)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                matrix = torch.sparse_csr_tensor(rows, source, weight.to(dtype), size, check_invariants=False)
            self._adjacency[dtype, rank] = matrix
        return self._adjacency[dtype, rank]

    def health(self, labels: Tensor | None = None) -> dict[str, float]:
        """Numbers that tell a useful graph from an empty one: sums over own rows, which can be added up over ranks.

        Args:
            labels: (B,) classes of own rows, negative where unknown; collective if given.

        Returns:
            nodes, edges and degree without self-loops, isolated nodes, same-class and labelled edges, milliseconds and
            bytes of collectives so far.
        """
        apart = self.source != self.target + self.offset
        source, target = self.source[apart], self.target[apart]
        degree = torch.bincount(target, minlength=self.num_targets)
        health = {
            "nodes": float(self.valid.sum()),
            "edges": float(len(source)),
            "isolated": float(((degree == 0) & self.valid).sum()),
        }
        if labels is not None:
            everyone = gather_rows(labels, self.counts, self.group)
            known = (everyone[source] >= 0) & (labels[target] >= 0)
            health["labelled_edges"] = float(known.sum())
            health["same_class_edges"] = float((known & (everyone[source] == labels[target])).sum())
        return health | {"gather_ms": 1000 * self.traffic.seconds, "gather_bytes": float(self.traffic.total_bytes)}


def normalised(graph: Graph, kind: str = "symmetric") -> Graph:
    """The graph with the weights of a normalisation; degrees count self-loops and are at least 1.

    Args:
        kind: `symmetric`: in-degree of the target to the -1/2 times out-degree of the source to the -1/2;
            `mean`: one over the in-degree of the target; `none`: 1.

    Source: GA-Net, arXiv 2408.00290, as DGL computes it: on directed graphs torch_geometric's GCNConv differs, which
    takes the in-degree at both ends.
    """
    if kind not in NORMALISATIONS:
        raise ValueError(f"normalisation {kind!r} is unknown; known: {', '.join(NORMALISATIONS)}")
    inward = graph.in_degree.clamp(min=1).double()[graph.target]
    if kind == "symmetric":
        weight = (inward * graph.out_degree.clamp(min=1)[graph.source]).rsqrt()
    else:
        weight = 1 / inward if kind == "mean" else torch.ones_like(inward)
    return replace(graph, weight=weight, _adjacency={})


def threshold_graph(
    x: Tensor,
    tau: float,
    valid: Tensor | None = None,
    *,
    group: Any = None,
    counts: list[int] | None = None,
    exchange: str = "gather",
    chunk: int | None = None,
) -> Graph:
    """Undirected graph: an edge both ways where the cosine of two samples exceeds `tau`, and one self-loop each.

    A pair is decided alike from both of its ends, however close its cosine is to `tau`, so that the graph is symmetric
    and the same for any number of ranks. Small graphs are found by every rank as a whole; of others each pair is
    decided once, on one rank, and the decisions travel as bits. Collective, without gradient.

    Args:
        x: (B, D) features of this rank; ranks may have different B. Compared in float32 (float64 stays), whose range
            bounds their lengths: 1e-18 to 1e18, or zero. A row that is not finite counts as one of zeros.
        tau: in [-1, 1]; equality makes no edge.
        valid: (B,) bool; what is not valid is absent: no edge, no self-loop. None = all are.
        group: ranks that share the graph; None = all.
        counts: B of every rank, where known; with them and without `valid` a small collective is saved.
        exchange: `gather`: every rank holds the features of all; `ring`: two ranks' at most. Same edges.
        chunk: similarities to hold at a time; None = by device.

    Raises:
        ValueError: if `tau` or a shape is wrong.

    Source: GA-Net, arXiv 2408.00290; released code of July 2024.
    """
    _check(x, valid, exchange, tau)
    nodes = Nodes(x, valid, None, counts, group, exchange)
    with counted(nodes.traffic):
        total, own_rows = sum(nodes.shares), slice(nodes.start, nodes.start + len(nodes.x))
        if nodes.finds_all(exchange):
            ((_, everyone),) = nodes.blocks(exchange)
            source, target, degree = edges_above(everyone, own_rows, tau, chunk)
            return _graph(nodes, source, target, degree, degree, exchange)
        bits = torch.zeros(len(nodes.x), max(1, -(-total // 8)), dtype=torch.uint8, device=x.device)
        for own, block in nodes.blocks(exchange):
            decide_pairs(own, block, total, tau, bits, chunk)
        everyone = gather_rows(bits, nodes.shares, group)
        source, target = symmetric_edges(everyone, own_rows, chunk)
        degree = symmetric_degrees(everyone)
    return _graph(nodes, source, target, degree, degree, exchange)


def knn_graph(
    x: Tensor,
    k: int,
    tau: float | None = None,
    valid: Tensor | None = None,
    key: Tensor | None = None,
    direction: str = "to_neighbour",
    symmetric: bool = False,
    *,
    released: bool = False,
    group: Any = None,
    counts: list[int] | None = None,
    exchange: str = "gather",
    chunk: int | None = None,
) -> Graph:
    """Graph of each sample with the k others that are most similar, and one self-loop each.

    Each rank searches for its own samples; the lists of neighbours travel, so that every rank knows all edges and
    degrees; small graphs are found by every rank as a whole. Equal cosines are ordered by `key`, so the graph is the
    same for any number of ranks and order of samples. Collective, without gradient. Memory besides the features:
    O(M k + chunk); with the ring O(B k + chunk) and the lists of neighbours, M k numbers of 4 bytes.

    Args:
        x, valid, group, counts, exchange, chunk: as for `threshold_graph`.
        k: neighbours of a sample; fewer where there are not as many.
        tau: keep a neighbour only if its cosine exceeds it; None = keep all k.
        key: (B,) int64, stable ids of the samples, different from each other; None = positions.
        direction: `to_neighbour`: messages go from a sample to its neighbours (GA-Net's second version);
            `from_neighbour`: the usual one, a sample hears its neighbours.
        symmetric: an edge both ways where either of two samples has the other as neighbour.
        released: as the released code: of k + 1 hits the first is dropped, taken to be the sample itself. Where
            identical samples are about (largest key first, as its search has it) the sample may stay among its own
            hits, and its self-loop then counts twice. Else the sample itself is left out.

    Raises:
        ValueError: if an option or a shape is wrong.

    Source: GA-Net, journal version of arXiv 2408.00290; released code of June 2025.
    """
    _check(x, valid, exchange, tau)
    if k < 1 or direction not in DIRECTIONS or (symmetric and released):
        raise ValueError(
            f"k {k} must be at least 1, direction {direction!r} one of {', '.join(DIRECTIONS)}, and a released graph "
            "is never symmetric"
        )
    if key is not None and (key.shape != x.shape[:1] or key.dtype != torch.int64):
        raise ValueError(f"key has shape {tuple(key.shape)} and {key.dtype}, expected ({len(x)},) and torch.int64")
    nodes = Nodes(x, valid, key, counts, group, exchange)
    with counted(nodes.traffic):
        whole = nodes.finds_all(exchange)
        hits = _search(nodes, k + released, tau, released, exchange, chunk, whole)
        if released:
            hits = _without_first(hits)
        kept = hits.position if tau is None else torch.where(hits.cosine > tau, hits.position, -1)
        neighbours = kept if whole else gather_rows(kept.int(), nodes.shares, group)
    total = sum(nodes.shares)
    source, target = _edges_of_lists(neighbours, direction, symmetric, full=tau is None and k < total)
    out_degree, in_degree = (_occurrences(ends, total) for ends in (source, target))
    if len(nodes.x) < total:
        own = ((target >= nodes.start) & (target < nodes.start + len(nodes.x))).nonzero()[:, 0]
        source, target = source[own], target[own]
    order = (target * total + source).argsort()
    return _graph(nodes, source[order], target[order], in_degree, out_degree, exchange, repeated=released)


def _graph(
    nodes: Nodes,
    source: Tensor,
    target: Tensor,
    in_degree: Tensor,
    out_degree: Tensor,
    exchange: str,
    repeated: bool = False,
) -> Graph:
    """Edges into own rows and degrees (V,) among valid rows, numbered as all rows are."""
    own = slice(nodes.offset, nodes.offset + len(nodes.valid))
    if not nodes.all_valid:
        source, target = nodes.positions[source], nodes.positions[target]
        spread = [
            degree.new_zeros(sum(nodes.counts)).index_copy_(0, nodes.positions, degree)
            for degree in (in_degree, out_degree)
        ]
        in_degree, out_degree = spread
    return Graph(
        source=source,
        target=target - nodes.offset if nodes.offset else target,
        weight=torch.ones(len(source), dtype=torch.float64, device=source.device),
        counts=nodes.counts,
        valid=nodes.valid,
        in_degree=in_degree[own],
        out_degree=out_degree,
        group=nodes.group,
        exchange=exchange,
        traffic=nodes.traffic,
        repeated=repeated,
    )


def _search(
    nodes: Nodes, k: int, tau: float | None, with_self: bool, exchange: str, chunk: int | None, whole: bool
) -> Nearest:
    """Hits of own rows, or with `whole` of all."""
    if whole or nodes.computes_twice(exchange):
        ((own, everyone),) = nodes.blocks(exchange)
        own = everyone if whole else own
        return nearest(own, everyone, nodes.keys, k, tau=tau, with_self=with_self, chunk=chunk)
    if exchange == "gather" or collectives.world_size(nodes.group) == 1:
        return _search_together(nodes, k, tau, with_self, chunk)
    hits = None
    for own, block in nodes.blocks(exchange):
        keys = nodes.keys[block.start : block.start + len(block)]
        nearest_here = nearest(own, block, keys, k, tau=tau, with_self=with_self, exact=True, chunk=chunk)
        hits = nearest_here if hits is None else hits.merge(nearest_here)
    return hits


def _search_together(nodes: Nodes, k: int, tau: float | None, with_self: bool, chunk: int | None) -> Nearest:
    """Each rank computes half of its similarities and sends the others what they need of them."""
    ((own, everyone),) = nodes.blocks("gather")
    values, columns, *of_all = shared_candidates(own, everyone, k, with_self=with_self, chunk=chunk)
    kept = values.shape[1]
    # one message: columns as numbers of the width of the values
    whole = torch.int64 if values.dtype == torch.float64 else torch.int32
    message = torch.cat([of_all[0].view(whole), of_all[1].to(whole)], 1)
    received = exchange_rows(message, nodes.shares, nodes.group)
    values, columns = best_of(
        [values, *(part[:, :kept].contiguous().view(values.dtype) for part in received)],
        [columns, *(part[:, kept:].long() for part in received)],
        kept,
    )
    return settled(own, everyone, nodes.keys, k, values, columns, tau=tau, with_self=with_self, chunk=chunk)


def _without_first(hits: Nearest) -> Nearest:
    """Drop the first of k + 1 hits; of equal ones the released search names the last key first."""
    equal = (hits.cosine == hits.cosine[:, :1]).sum(1, keepdim=True)
    slots = torch.arange(hits.cosine.shape[1] - 1, device=equal.device)
    slots = slots + (slots >= equal - 1)
    return Nearest(*(column.gather(1, slots) for column in (hits.position, hits.cosine, hits.key)))


def _edges_of_lists(neighbours: Tensor, direction: str, symmetric: bool, full: bool) -> tuple[Tensor, Tensor]:
    """Sources and targets of all edges, from the (V, k) lists of all ranks; -1 is none. Self-loops are added.

    `full`: there is no -1, so that nobody waits for the number of edges.
    """
    own = torch.arange(len(neighbours), device=neighbours.device)
    if full:
        query, neighbour = own[:, None].expand(neighbours.shape).flatten(), neighbours.flatten().long()
    else:
        query, slot = (neighbours >= 0).nonzero(as_tuple=True)
        neighbour = neighbours[query, slot].long()
    source, target = (query, neighbour) if direction == "to_neighbour" else (neighbour, query)
    if symmetric:
        total = max(1, len(neighbours))
        codes = torch.cat([target * total + source, source * total + target]).unique()
        source, target = codes % total, codes // total
    return torch.cat([source, own]), torch.cat([target, own])


def _occurrences(numbers: Tensor, total: int) -> Tensor:
    """(total,) int64, how often each number below `total` occurs; `torch.bincount` would wait for a GPU."""
    return numbers.new_zeros(total).index_add_(0, numbers, torch.ones_like(numbers))


def _check(x: Tensor, valid: Tensor | None, exchange: str, tau: float | None) -> None:
    if x.ndim != 2:
        raise ValueError(f"features have shape {tuple(x.shape)}, expected (rows, width)")
    if valid is not None and (valid.shape != x.shape[:1] or valid.dtype != torch.bool):
        raise ValueError(f"valid has shape {tuple(valid.shape)} and {valid.dtype}, expected ({len(x)},) and bool")
    if tau is not None and not -1 <= tau <= 1:
        raise ValueError(f"tau {tau} is not a cosine: it must be within [-1, 1]")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange {exchange!r} is unknown; known: {', '.join(EXCHANGES)}")
