"""Low-rank paths whose factors a small graph of learned nodes writes, as GA-Net tunes its captioner (2408.00290)."""

# d in width, o width of a part, r rank, k width of a node, R relations

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.beside import Added, is_eager, with_added
from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.common.fused import Fusable
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.low_rank import Product
from mmpeft_ds.methods.common.products import Multiplies, at_edge
from mmpeft_ds.methods.common.select import Selection, select
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.methods.graph_lora.options import GraphLoraOptions
from mmpeft_ds.ops.beside_linear import Onto
from mmpeft_ds.ops.node_graph import node_mix
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.ops.written_sum import Graph, Writing, mixed_nodes, plus_written
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.base import base_layer, features
from mmpeft_ds.sites.once import once

NODES = 2  # one writes `down`, the other `up`


@dataclass
class GraphLoraConfig(GraphLoraOptions, MethodConfig):
    """GraphLoraOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "GRAPH_LORA"


class WrittenFactors(Fusable, Multiplies):
    """The graph of one part of one projection, and the maps from its nodes to the two factors. The adjacency is a
    parameter as published, though only whether an entry is 0 matters: its gradient is zero.

    Args:
        d, o: input features, and output features of the part.
        like: a frozen parameter, whose device is taken, and whose dtype if it is float64; else float32.
        graphs: those of this adapter so far, to which it adds itself.
    """

    def __init__(self, config: GraphLoraConfig, d: int, o: int, like: Tensor, graphs: list[WrittenFactors]):
        super().__init__()
        self.graphs = (graphs,)  # a tuple: no submodules
        graphs.append(self)
        self.r, self.d, self.o, self.scale = config.r, d, o, config.scale
        k, relations = config.node_width, config.relations
        dtype = full_dtype(like.dtype)
        shapes = {
            "node": (NODES, k),
            "relation_weight": (relations, k, k),
            "relation_bias": (relations, k),
            "attention_weight": (1, 2 * k),
            "attention_bias": (1,),
            "gate_weight": (1, k),
            "gate_bias": (1,),
            "adjacency": (relations, NODES, NODES),
            "down_weight": (config.r * d, k),
            "down_bias": (config.r * d,),
            "up_weight": (o * config.r, k),
            "up_bias": (o * config.r,),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype, device=like.device)))
        self.reset(config)

    @torch.no_grad()
    def reset(self, config: GraphLoraConfig) -> None:
        """Nodes from N(0, 1), maps as those of `nn.Linear`; `up` zero where the config says so."""
        for name, parameter in self.named_parameters():
            fan_in = 2 * config.node_width if name.startswith("attention") else config.node_width
            parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5)
        self.node.normal_()
        if config.adjacency == "dense":
            self.adjacency.fill_(1.0)
        else:
            self.adjacency.copy_(torch.eye(NODES).expand_as(self.adjacency))
        if config.near_identity:
            self.up_weight.zero_()
            self.up_bias.zero_()

    def nodes(self) -> Tensor:
        """Nodes after the message passing, (2, k)."""
        mixed = node_mix(
            self.node, self.relation_weight, self.relation_bias, self.attention_weight[0], self.attention_bias,
            self.adjacency, self.gate_weight[0], self.gate_bias,
        )  # fmt: skip
        # A gradient of zero: torch's DistributedDataParallel stops at a parameter that gets none.
        return mixed + 0 * self.adjacency.sum()

    def factors(self) -> tuple[Tensor, Tensor]:
        """`down` (r, d) and `up` (o, r)."""
        first, second = self.nodes()
        down = ((self.down_weight * first).sum(-1) + self.down_bias).view(self.r, self.d)
        return down, ((self.up_weight * second).sum(-1) + self.up_bias).view(self.o, self.r)

    def forward(self, x: Tensor, onto: Onto | None = None, start: int = 0) -> Tensor:
        """(..., d) -> (..., o), what is added to the frozen output.

        Args:
            onto: what it is added to, where `is_eager` says so; the sum is returned then.
            start: output feature of `onto` at which the part begins.
        """
        if onto is not None:
            writing = Writing(*(getattr(self, name) for name in Writing._fields))
            return plus_written(onto, x, self._mixed(), writing, self.r, start=start, scale=self.scale)
        down, up = self.factors()
        with self.multiplying(x):
            return self.scale * F.linear(F.linear(at_edge(x, down.dtype), down), up)

    def _mixed(self) -> Tensor:
        """As `nodes`, of all graphs on this device at once in a forward, where nothing is in parts (ZeRO-3)."""
        alone = lambda: mixed_nodes([self._graph()])[0]  # noqa: E731
        if hasattr(self.node, "ds_id"):
            return alone()
        device, graphs = self.node.device, self.graphs[0]

        def of_all() -> dict[WrittenFactors, Tensor]:
            here = [each for each in graphs if each.node.device == device]
            return dict(zip(here, mixed_nodes([each._graph() for each in here]), strict=True))

        return once((id(graphs), device), self, of_all, alone)

    def _graph(self) -> Graph:
        return Graph(*(getattr(self, name) for name in Graph._fields))


class GraphLoraLinear(nn.Module, SiteLayer):
    """A frozen Linear or Conv1D and, per adapter, one graph for each of its adapted parts."""

    adapter_layer_names = ("graph_lora",)
    other_param_names = ("parts",)
    tokenwise = True

    def __init__(self, base: nn.Module, adapter_name: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.in_features, self.out_features = features(base)
        self.graph_lora = nn.ModuleDict()
        self.parts: dict[str, list[tuple[int, int]]] = {}

    def update_layer(
        self,
        adapter_name: str,
        parts: list[tuple[int, int]],
        config: GraphLoraConfig,
        path: str,
        graphs: list[WrittenFactors],
    ) -> None:
        """Add an adapter; `parts` are (first output feature, width), `path` names this layer in error messages,
        `graphs` are those of the adapter so far."""
        self.path = path
        like = base_layer(self).weight
        written = [WrittenFactors(config, self.in_features, width, like, graphs) for _, width in parts]
        self.parts[adapter_name] = parts
        self.graph_lora[adapter_name] = nn.ModuleList(written)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., d) -> (..., out)."""
        active = [] if self._frozen() else [n for n in self.active_adapters if n in self.parts]
        added = [
            self._added(written, x, *part) for name in active
            for part, written in zip(self.parts[name], self.graph_lora[name], strict=True)
        ]  # fmt: skip
        return with_added(self.base_layer, x, added, *args, **kwargs)

    def _added(self, written: WrittenFactors, x: Tensor, start: int, width: int) -> Added:
        # `node` may be away in parts (ZeRO-3) until the module is called, but not its dtype.
        joins = is_eager(written, x, written.node.dtype)

        def alone() -> Tensor:
            made = written(x)
            return made if width == self.out_features else F.pad(made, (start, self.out_features - start - width))

        return Added(joins, lambda onto: written(x, onto, start), alone)

    def lora_factors(self, adapter_name: str) -> list[Product]:
        """The factors that the graphs of all parts compute."""
        products = []
        for (start, _), written in zip(
            self.parts.get(adapter_name, ()),
            self.graph_lora[adapter_name] if adapter_name in self.parts else (),
            strict=True,
        ):
            down, up = written.factors()
            products.append(Product(start, down, written.scale * up))
        return products

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the change into the frozen weight."""
        for name in self._start_merge(adapter_names, ("weight",)):
            with torch.no_grad():
                changes = [product.up @ product.down for product in self.lora_factors(name)]
            self._fold(name, self.parts[name], changes, safe_merge)


class GraphLoraModel(SiteTuner):
    """Tuner with the verbs of every peft tuner; see `GraphLoraConfig`."""

    prefix = "graph_lora"

    @classmethod
    def no_lora(cls, config: GraphLoraConfig) -> None:
        """Its graphs write two thin factors."""

    def places(self, config: GraphLoraConfig, model: nn.Module) -> dict[str, list[tuple[int, int]]]:
        self._graphs: list[WrittenFactors] = []  # of the adapter that is being added
        projections = _chosen(config, find_sites(model)).projections(config.targets)
        return {path: [(p.start, p.width) for p in parts] for path, parts in projections.items()}

    def wrap(
        self, config: GraphLoraConfig, adapter_name: str, target: nn.Module, place: list[tuple[int, int]], path: str
    ) -> nn.Module:
        layer = target if isinstance(target, SiteLayer) else GraphLoraLinear(target, adapter_name)
        if not isinstance(layer, GraphLoraLinear):
            raise BadInput(
                f"{path}: an earlier adapter of this model is a {type(layer).__name__} here. Use one of them."
            )
        layer.update_layer(adapter_name, place, config, path, self._graphs)
        return layer


class GraphLora(SiteMethod):
    """The method entry: what recipes and the engine use."""

    Options = GraphLoraOptions
    Config = GraphLoraConfig
    Tuner = GraphLoraModel
    tables = (".node", ".relation_bias")  # a row for each node, and for each relation

    @classmethod
    def check(cls, config: GraphLoraConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no such tower or layer."""
        _chosen(config, sites)


def _chosen(config: GraphLoraConfig, sites: Sites) -> Selection:
    return select(sites, config.tower, config.layers)


ENTRY = GraphLora
