"""The head of HeGraphAdapter: what trains, what is made once, and how ranks share the work."""

# C classes, R own classes, D width, M cache rows, B rows of this rank, G rows of all ranks

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.gather import gather_rows, gather_sizes
from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.distributed.shards import all_reduced, columns_to_rows, sharded_cross_entropy, sum_to_owner
from mmpeft_ds.distributed.support import check_agreement
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.hegraph.nodes import Made, Nodes
from mmpeft_ds.ops import class_graph as ops
from mmpeft_ds.ops.class_graph import Refined
from mmpeft_ds.ops.class_relations import Coefficients, in_use
from mmpeft_ds.ops.precision import full_dtype

WEIGHTS = {"negative": "W_n", "positive": "W_p", "visual": "W_v"}  # receiving kind -> parameter
SHARDS = ("none", "cache", "classes")


class ClassGraphHead(nn.Module):
    """The numerics; a subclass calls `set_up` when it is made, and says where the nodes come from.

    Trains W_n, W_p, W_v (D, D), one for each kind of receiver, and with `learned` the factors of the messages. While
    `training` is set the factor of n -> p is `alpha_np`, otherwise `alpha_np_test`.

    Whatever is shared out, a rank scores its own rows, and its loss is that of its own rows: gradients add up over
    ranks as those of any data-parallel module.

    Source: HeGraphAdapter, arXiv 2410.07854.
    """

    # The engine trains in evaluation mode where no dropout is asked for. A module with this mark stays in training
    # mode during training steps, whatever the rest does.
    follows_training = True

    def set_up(
        self,
        width: int,
        coefficients: Coefficients,
        tau: float,
        *,
        drop: Collection[str] = (),
        degree: str = "bipartite",
        flip: bool = True,
        topk: int | None = None,
        activation: str = "tanh",
        visual_scale: float | None = None,
        cache_reduce: str = "sum",
        fuse: str = "probabilities",
        learned: bool = False,
        shard: str = "none",
        group: Any = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make the parameters and remember the options.

        Args:
            width: D.
            coefficients: the factors.
            tau: scale of the text head's logits.
            drop: relations to leave out.
            degree, flip, topk: see `ops.class_graph.class_graph`.
            activation: of the messages.
            visual_scale: scale of the cache head's logits; None: tau.
            cache_reduce: `sum` or `mean` over the cache rows of a class.
            fuse: see `ops.class_graph.fuse`.
            learned: train the factors.
            shard: `none`: every rank holds everything; `cache`: some cache rows and their affinity to the rows of
                all ranks; `classes`: some classes and their cache rows.
            group: process group that shares; None: all ranks.

        Raises:
            BadInput: an option that is unknown.
        """
        known = {"activation": ops.ACTIVATIONS, "degree": ops.DEGREES, "shard": SHARDS, "fuse": ops.FUSIONS}
        given = {"activation": activation, "degree": degree, "shard": shard, "fuse": fuse}
        for key, value in given.items():
            if value not in known[key]:
                raise BadInput(f"{key}: {value!r} is unknown. Known: {', '.join(known[key])}.")
        self.coefficients, self.tau = coefficients, float(tau)
        self.relations = in_use(drop)
        self.graph_options = {"degree": degree, "flip": flip, "topk": topk}
        self.activation, self.fuse, self.cache_reduce = activation, fuse, cache_reduce
        self.visual_scale = self.tau if visual_scale is None else float(visual_scale)
        self.shard, self.group = shard, group
        factory = {"device": device, "dtype": full_dtype(dtype)}
        for kind, name in WEIGHTS.items():
            used = any(relation.receiver == kind for relation in self.relations.values())
            setattr(self, name, nn.Parameter(torch.empty(width, width, **factory)) if used else None)
        self.factors = nn.Parameter(torch.empty(len(self.relations), **factory)) if learned else None
        self.reset_parameters()
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._made: Made | None = None
        self._agreed: Made | None = None
        self._kept: tuple[Made, list[Tensor], Refined] | None = None
        self._warned = False

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W from U(-1 / sqrt(D), 1 / sqrt(D)); learned factors such that they start as configured."""
        for weight in self.weights().values():
            bound = 1 / math.sqrt(weight.shape[0])
            weight.uniform_(-bound, bound)
        if self.factors is not None:
            start = self.coefficients.of_relations(training=True)
            values = [math.log(math.expm1(start[name])) for name in self.relations]
            self.factors.copy_(torch.tensor(values, dtype=self.factors.dtype))

    def nodes(self) -> Nodes:
        """The frozen features."""
        raise NotImplementedError

    def source(self) -> list[Tensor]:
        """The tensors that `nodes` reads; when one of them changes, everything is made again."""
        raise NotImplementedError

    def replicated(self) -> list[Tensor]:
        """Those of them that must be the same on every rank."""
        raise NotImplementedError

    def weights(self) -> dict[str, nn.Parameter]:
        """Receiving kind -> weight, of the relations in use."""
        named = {kind: getattr(self, name) for kind, name in WEIGHTS.items()}
        return {kind: weight for kind, weight in named.items() if weight is not None}

    # -------------------------------------------------------------------------------------------------- scores

    def both(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the text head and of the cache head for own rows. Collective where something is shared out.

        Args:
            z: (B, D) image features of this rank, not normalised; ranks may have different B, also 0.
        """
        made = self._checked()
        with torch.autocast(z.device.type, enabled=False):
            z, refined = z.to(self.dtype), self.refined(self.training)
            if self.shard == "none":
                return self._text(z, refined), self._visual(self._affinity(z, refined), made.cache_rows)
            counts = self._counts(z)
            everyone = gather_rows(z, counts, self.group)
            if self.shard == "cache":
                near = sum_to_owner(self._affinity(everyone, refined), counts, self.group)
                return self._text(z, refined), self._visual(near, made.cache_rows)
            text, visual = self._own_columns(everyone, refined)
            text, visual = (columns_to_rows(x, counts, made.columns, self.group) for x in (text, visual))
            return text, visual

    def losses(self, z: Tensor, labels: Tensor) -> Tensor:
        """(B,) cross-entropy of the text head plus lambda times that of the cache head, for own rows.

        Where classes are shared out no rank ever holds all logits of a row. Collective as `both`.

        Args:
            labels: (B,) int64.
        """
        if self.shard == "classes":
            made = self._checked()
            with torch.autocast(z.device.type, enabled=False):
                counts = self._counts(z)
                everyone = gather_rows(z.to(self.dtype), counts, self.group)
                targets = gather_rows(labels, counts, self.group)
                heads = self._own_columns(everyone, self.refined(self.training))
                text, visual = (sharded_cross_entropy(x, targets, made.columns, counts, self.group) for x in heads)
        else:
            text, visual = (cross_entropy(x, labels, reduction="none") for x in self.both(z))
        return text + self.coefficients.visual_loss * visual

    def log_probabilities(self, text: Tensor, visual: Tensor) -> Tensor:
        """(B, C) what both heads say together."""
        return ops.fuse(text, visual, self.fusion, self.fuse)

    def predict(self, z: Tensor) -> Tensor:
        """(B, C) probabilities."""
        return self.log_probabilities(*self.both(z)).exp()

    def refine(self) -> tuple[Tensor, Tensor | None]:
        """Refined texts P' and class shifts b of the cache, (R, D) each, in the mode of this module."""
        refined = self.refined(self.training)
        return refined.text, refined.shift

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """A classifier that needs no graph: what `ops.class_graph.classify` takes, on the CPU. All ranks call it."""
        with gathered([p for p in self.parameters() if p.numel() != getattr(p, "ds_numel", p.numel())]):
            made, refined = self.made(), self.refined(training=False)
            text, labels = refined.text, made.nodes.labels
            cache = self._moved(refined, training=False)
        if self.shard == "classes":
            text = gather_rows(text, made.columns, self.group)
        if self.shard != "none":
            cache, labels = (gather_rows(x, group=self.group) for x in (cache, labels))
        numbers = {"tau": self.tau, "visual_scale": self.visual_scale, "fusion": self.fusion}
        flags = {"mean_over_rows": self.cache_reduce == "mean", "fuse_logits": self.fuse == "logits"}
        exported = {
            "text": text,
            "cache": cache,
            "labels": labels,
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()},
            **{name: torch.tensor(value) for name, value in flags.items()},
        }
        return {name: tensor.detach().cpu().contiguous() for name, tensor in exported.items()}

    def graph(self) -> ops.ClassGraph:
        """Edges of every relation between own receivers and all senders. Collective where classes are shared out."""
        nodes, options = self._whole(self.nodes().to(self.dtype))
        return ops.class_graph(nodes, relations=self.relations, **self.graph_options, **options)

    def hetero_data(self) -> Any:
        """The class graph as `torch_geometric.data.HeteroData`; see `ops.class_graph_data`."""
        from mmpeft_ds.ops.class_graph_data import hetero_data  # torch_geometric takes seconds to import

        if self.shard == "classes" and collectives.world_size(self.group) > 1:
            raise BadInput("hetero_data: no rank holds the whole graph with shard: classes. Use shard: none.")
        return hetero_data(self.graph(), self.nodes().to(self.dtype).of_classes, self.relations)

    # ------------------------------------------------------------------------------------------------- the parts

    @property
    def dtype(self) -> torch.dtype:
        """In which everything is computed: float64 for float64 weights, else float32."""
        wide = any(p.dtype == torch.float64 for p in self.parameters())
        return torch.float64 if wide else torch.float32

    @property
    def fusion(self) -> float:
        """w, weight of the cache head in predictions."""
        return self.coefficients.fusion

    def message_factors(self, training: bool) -> Tensor:
        """(relations,) factor of each message."""
        fixed = self.coefficients.of_relations(training)
        if self.factors is None:
            return self._constant([fixed[name] for name in self.relations])
        learned = softplus(self.factors.to(self.dtype))
        if training:
            return learned
        # What was learned is the factor of training; the ratio of the two stays as configured.
        start = self.coefficients.of_relations(True)
        ratio = [fixed[name] / start[name] for name in self.relations]
        return learned * self._constant(ratio)

    def _constant(self, values: list[float]) -> Tensor:
        """These numbers on the device, to which they are copied once."""
        key = *values, self.dtype, self._device
        if key not in self._constants:
            with torch.inference_mode(False):
                self._constants[key] = torch.tensor(values, dtype=self.dtype, device=self._device)
        return self._constants[key]

    def refined(self, training: bool) -> Refined:
        """One round of messages, for own classes. Collective where classes are shared out."""
        made = self.made()
        weights = {kind: weight.to(self.dtype) for kind, weight in self.weights().items()}
        factors = self.message_factors(training)
        given = [*weights.values(), factors]
        if torch.is_grad_enabled():
            self._kept = None
        elif self._kept is not None and self._kept[0] is made and _equal(self._kept[1], given):
            return self._kept[2]
        shared = self.shard == "classes"
        refined = ops.refine(
            made.fixed,
            weights,
            dict(zip(self.relations, factors, strict=True)),
            self.activation,
            (lambda rows: gather_rows(rows, made.columns, self.group)) if shared else None,
        )
        if not torch.is_grad_enabled():
            # Without gradients nothing changes from batch to batch, and the round costs more than all the rest.
            self._kept = (made, [t.detach().clone() for t in given], refined)
        return refined

    def made(self) -> Made:
        """Values computed from the nodes, again where these have changed. Collective then if something is sharded."""
        source = self.source()
        versions = [0 if t.is_inference() else t._version for t in source]
        made = self._made
        if (
            made is None
            or made.fixed.positive.dtype != self.dtype
            or versions != made.versions
            or any(a is not b for a, b in zip(source, made.source, strict=True))
        ):
            with torch.inference_mode(False), torch.no_grad():
                self._made = self._make(source, versions)
        return self._made

    def _make(self, source: list[Tensor], versions: list[int]) -> Made:
        nodes = self.nodes().to(self.dtype)
        whole, options = self._whole(nodes)
        fixed = ops.products(whole, relations=self.relations, **self.graph_options, **options)
        first = options["rows"].start if options else 0
        classes = len(whole["positive"])
        columns = [classes]
        if self.shard == "classes":
            columns = [n for (n,) in gather_sizes([len(nodes.positive)], nodes.positive.device, self.group)]
            own = (nodes.labels >= first) & (nodes.labels < first + len(nodes.positive))
            if not own.all():
                raise BadInput("cache: with shard: classes a rank holds the cache rows of its own classes alone.")
        rows = torch.bincount(nodes.labels, minlength=classes)
        if self.shard != "none":
            all_reduced(rows, group=self.group)
        return Made(source, versions, nodes, fixed, columns, first, rows.clamp(min=1))

    def _whole(self, nodes: Nodes) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nodes of all classes, and the options of `class_graph` that say which rows of the graph are held here."""
        if self.shard != "classes" or collectives.world_size(self.group) == 1:
            return nodes.of_classes, {}
        counts = self._counts(nodes.positive)
        first = sum(counts[: collectives.rank(self.group)])

        def totals(own: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
            return gather_rows(own, counts, self.group), all_reduced(sent, group=self.group)

        whole = {kind: gather_rows(x, counts, self.group) for kind, x in nodes.of_classes.items()}
        return whole, {"rows": slice(first, first + len(nodes.positive)), "totals": totals}

    def _checked(self) -> Made:
        """`made`; on the first step of training the ranks agree that they hold the same features."""
        made = self.made()
        if torch.is_grad_enabled() and self._agreed is not made:
            check_agreement(self.replicated(), "support features and class texts", self.group)
            self._agreed = made
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if trains and not self.training and not self._warned:
            self._warned = True
            warnings.warn(
                "hegraph scores with alpha_np_test while gradients are recorded: call train() to train, or evaluate "
                "under torch.no_grad()",
                stacklevel=3,
            )
        return made

    def _counts(self, x: Tensor) -> list[int]:
        return [n for (n,) in gather_sizes([len(x)], x.device, self.group)]

    def _text(self, z: Tensor, refined: Refined) -> Tensor:
        return ops.text_logits(z, refined.text, self.tau)

    def _affinity(self, z: Tensor, refined: Refined) -> Tensor:
        """(len(z), R), to own cache rows alone; with shared rows (len(z), C)."""
        made = self.made()
        cache = self._moved(refined, self.training)
        return ops.affinity(z, cache, made.labels, len(refined.text))

    def _moved(self, refined: Refined, training: bool) -> Tensor:
        """(M, D) own cache rows after the shift of their classes."""
        made = self.made()
        if refined.shift is None:
            return made.nodes.cache
        gamma = self.message_factors(training)[list(self.relations).index("vv")]
        return ops.shifted_cache(made.nodes.cache, made.labels, refined.shift, gamma)

    def _visual(self, near: Tensor, rows: Tensor) -> Tensor:
        if self.cache_reduce == "mean":
            near = near / rows.to(near.dtype)
        return self.visual_scale * near

    def _own_columns(self, everyone: Tensor, refined: Refined) -> tuple[Tensor, Tensor]:
        """(G, R) logits of own classes by both heads, for the rows of all ranks."""
        made = self.made()
        visual = self._visual(self._affinity(everyone, refined), made.cache_rows[made.own])
        return self._text(everyone, refined), visual

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


def _equal(before: list[Tensor], now: list[Tensor]) -> bool:
    return len(before) == len(now) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(before, now, strict=True)
    )
