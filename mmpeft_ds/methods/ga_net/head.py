"""The network of GA-Net: `down`, graph convolution, `up`, graph convolution to classes, over samples of all ranks."""

# B rows of this rank, D width of a node (text and image joined), Dt, Dv of its parts, h width in the fusion, C classes

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.batch_graph import Graph, knn_graph, normalised, threshold_graph
from mmpeft_ds.distributed.gather import gather_rows, gather_sizes
from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import nonzero, on_host, surely_all
from mmpeft_ds.methods.common.few_shot import Remembered
from mmpeft_ds.methods.common.head import Head
from mmpeft_ds.methods.ga_net.config import GaNetConfig
from mmpeft_ds.sites.feature_site import Features, Labelled, Scores


class Fusion(nn.Module):
    """Text and image features weighed against each other, a pair of weights per sample.

    The weights are made of projections of width h; they multiply the features as they came, so both have one width.

    Source: the release of June 2025; it takes part in its Fisher pass alone.
    """

    def __init__(self, text_width: int, image_width: int, width: int):
        super().__init__()
        self.text, self.image = nn.Linear(text_width, width), nn.Linear(image_width, width)
        self.hidden, self.weigh = nn.Linear(2 * width, width), nn.Linear(width, 2)

    def forward(self, text_BD: Tensor, image_BD: Tensor) -> Tensor:
        """(B, D)."""
        both = torch.cat([self.text(text_BD), self.image(image_BD)], 1)
        weights = self.weigh(self.hidden(both).relu()).softmax(1)
        return weights[:, :1] * text_BD + weights[:, 1:] * image_BD


class GaNetHead(Head):
    """Classifies each sample from itself and those it is joined to: one graph a forward over the rows of all ranks.

    No gradient goes through the making of the graph. All ranks run the same collectives whatever rows they have.

    Source: Cheng, Lu, arXiv 2408.00290.
    """

    calibrated = found_anew = ("tau_choice",)
    over_batch = True

    def __init__(self, config: GaNetConfig, base: nn.Module):
        # torch_geometric takes a second to import, which is for runs with a graph alone
        from mmpeft_ds.distributed.graph_conv import GraphConv

        super().__init__(config, base)
        joined = sum(self._widths())
        up = joined if config.up == "joined" else base.image_width
        self.down = nn.Linear(joined, config.r)
        self.conv = GraphConv(config.r, config.r)
        self.up = nn.Linear(config.r, up)
        self.classifier = GraphConv(up, self.bank.num_classes)
        self.fusion = Fusion(base.text_width, base.image_width, config.fusion_width) if config.fusion else None
        # an index, because whole numbers outlive every change of dtype
        self.register_buffer("tau_choice", torch.tensor(-1))
        self._once = Remembered()
        self._fisher = self._alone = False
        if config.train == "head":
            frozen = ("down", "conv", "up")
            self.calibrated += tuple(f"{part}.{name}" for part in frozen for name in _freeze(self.get_submodule(part)))

    @property
    def tau(self) -> float:
        """The threshold of the cosine, configured or searched on validation rows."""
        choice = self._once.get("tau", int, self.tau_choice) if self.config.tau_grid else -1
        return self.config.tau if choice < 0 else self.config.tau_grid[choice]

    def forward(self, features: Features) -> Scores:
        """Collective. Rows that are not valid have no edge, no part in any gradient, and logits that mean nothing."""
        features = self._clean(features)
        graph = self.graph(features)
        return Scores(self.classifier(self._hidden(features, graph), graph), graph=graph)

    def nodes(self, features: Features, normalise: bool) -> Tensor:
        """(B, D): text and image joined, in this order; with `normalise` each of length 1."""
        parts = {"text": features.text, "image": features.image}
        kept = [x for name, x in parts.items() if self.config.inputs in (name, "both")]
        return torch.cat([F.normalize(x, dim=1) for x in kept] if normalise else kept, 1)

    @torch.no_grad()
    def graph(self, features: Features) -> Graph:
        """Edges from the samples of all ranks to own ones, with the weights of the convolutions. Collective."""
        config, valid = self.config, features.valid
        if config.graph == "none" or self._alone:
            return _edgeless(valid)
        x = self.nodes(features, config.normalise_similarity)
        if config.graph == "threshold":
            graph = threshold_graph(x, self.tau, valid, exchange=config.exchange)
        else:
            graph = knn_graph(
                x,
                config.k,
                self.tau,
                valid,
                features.key,
                config.direction,
                config.symmetric,
                released=config.self_loops == "appended",
                exchange=config.exchange,
            )
        return normalised(graph, config.normalisation)

    @contextlib.contextmanager
    def estimating_fisher(self) -> Iterator[None]:
        """Inside, `forward` gives the logits of which the Fisher information is estimated: with `fisher: released`
        those of the classifier on the node itself (v1) or on the fused features (v2)."""
        before, self._fisher = self._fisher, True
        try:
            yield
        finally:
            self._fisher = before

    @contextlib.contextmanager
    def without_edges(self) -> Iterator[None]:
        """Inside, every sample is scored by itself (A = I)."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    @property
    def calibrates(self) -> bool:
        """There are several tau to choose from."""
        return bool(self.config.tau_grid)

    @torch.no_grad()
    def calibrate(self, train: Labelled, validation: Labelled | None) -> dict[str, float]:
        """Take the tau of `tau_grid` with the best top-1 on validation rows, in graphs of `tau_batch` rows, which the
        ranks share. Without a grid nothing happens.

        Raises:
            BadInput: a grid but no validation rows.
        """
        grid = self.config.tau_grid
        if not grid:
            return {}
        if validation is None:
            raise BadInput("method.tau_grid: there are no validation rows to search on. Add data.validation.")
        scores = []
        for choice in range(len(grid)):
            self.tau_choice.fill_(choice)
            scores.append(self.top1(validation, self.config.tau_batch)["top1"])
        best = max(range(len(grid)), key=scores.__getitem__)
        self.tau_choice.fill_(best)
        return {"tau": grid[best], "validation_top1": scores[best]}

    @torch.no_grad()
    def top1(self, rows: Labelled, size: int, order: Tensor | None = None) -> dict[str, float]:
        """Share of `rows` predicted right in graphs of `size` of them, which the ranks share. Collective.

        Args:
            rows: the same on every rank, like the result.
            order: (n,) in which they come to the graphs; None: as they are.

        Returns:
            `top1`, and the sums over all graphs of what `Graph.health` tells, by its names.
        """
        ranks, rank, total = collectives.world_size(), collectives.rank(), len(rows.labels)
        order = torch.arange(total, device=rows.labels.device) if order is None else order
        sums: dict[str, float] = {"top1": 0.0}
        for batch in order.split(size):
            own = batch.tensor_split(ranks)[rank]
            scores = self(rows.features[own])
            sums["top1"] += (scores.logits.argmax(1) == rows.labels[own]).sum().item()
            for name, value in scores.graph.health(rows.labels[own]).items():
                sums[name] = sums.get(name, 0.0) + value
        summed = collectives.sum_scalars(list(sums.values()), rows.labels.device)
        totals = dict(zip(sums, summed, strict=True))
        return {**totals, "top1": totals["top1"] / max(1, total)}

    def _hidden(self, features: Features, graph: Graph) -> Tensor:
        """The input of the last convolution."""
        config = self.config
        x_BD = self.nodes(features, config.normalise_input)
        if self._fisher and config.fisher == "released":
            return x_BD if self.fusion is None else self.fusion(features.text, features.image)
        h = self.conv(self.down(x_BD), graph)
        if config.activation == "relu":
            h = h.relu()
        u = self.up(h)
        return u + x_BD if config.residual else u

    def _clean(self, features: Features) -> Features:
        """Features in the dtype of the weights, zeros in rows that are not valid: a NaN there would reach gradients.

        Raises:
            BadInput: samples without text, which the node needs.
        """
        image, text, valid = features.image, features.text, features.valid
        if text is None:
            if len(image) and self.config.inputs != "image":
                raise BadInput(
                    "ga_net: the samples bring no text, which `inputs` names. Add captions with "
                    "launchers/describe.py, or set method.inputs: image."
                )
            text = image.new_zeros(len(image), self.base.text_width)
        # Not by name: at ZeRO-3 the weight of another module that this one names is gathered with it and held as long.
        dtype = next(self.classifier.parameters()).dtype
        if not surely_all(valid):
            image, text = (x.masked_fill(~valid[:, None], 0) for x in (image, text))
        return Features(image.to(dtype), text.to(dtype), valid, features.key)

    def _widths(self) -> list[int]:
        widths = {"text": self.base.text_width, "image": self.base.image_width}
        return [width for name, width in widths.items() if self.config.inputs in (name, "both")]


def _edgeless(valid: Tensor) -> Graph:
    """Self-loops alone. Collective."""
    counts = [n for (n,) in gather_sizes([len(valid)], valid.device)]
    own = nonzero(valid, int(on_host(valid).sum()))[:, 0]
    loops = gather_rows(valid.long(), counts)
    weight = torch.ones(len(own), dtype=torch.float64, device=valid.device)
    start = sum(counts[: collectives.rank()])
    return Graph(own + start, own, weight, counts, valid, in_degree=valid.long(), out_degree=loops, repeated=False)


def _freeze(module: nn.Module) -> list[str]:
    """Make the parameters of `module` buffers, and give their names: checkpoints and adapter directories hold them."""
    names = list(module._parameters)
    for name in names:
        values = module._parameters.pop(name).detach()
        module.register_buffer(name, values)
    return names
