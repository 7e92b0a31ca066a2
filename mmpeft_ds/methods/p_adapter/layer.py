"""Layers of p-Adapter: the branch at the end of an attention sublayer, and the one beside the feed-forward block."""

# B batch, N query tokens, M value tokens, H heads, d width, b channels of a node

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.beside import is_eager, is_watched, plain_linear
from mmpeft_ds.methods.common.fused import Fusable
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.products import Multiplies, at_edge
from mmpeft_ds.methods.p_adapter.attention_graph import Propagation
from mmpeft_ds.methods.p_adapter.config import PAdapterConfig
from mmpeft_ds.ops.beside_linear import Linear, Onto
from mmpeft_ds.ops.p_laplacian_branch import Maps, Nodes, plus_branch
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.ops.relu_sum import plus_relu
from mmpeft_ds.sites.base import AttentionSite, FFNSite, base_layer
from mmpeft_ds.sites.observe import Observation, close_for, observe, open_for, opened

INIT_STD = 0.02


class AttentionBranch(nn.Module, Multiplies):
    """The branch of one adapter, which is added to an attention output (`published`: replaces it).

    released: up(gelu(gate(h)) * U), with U the query nodes after one step over the attention map and nodes
    down(W_o z + b_o) of the projected tokens z, cut into heads. published: V + up(relu(down(V))), V the query nodes
    after a step in full width.

    Args:
        site: where it stands.
        width: of the attention output.
        config: of the adapter.
    """

    def __init__(self, site: AttentionSite, width: int, config: PAdapterConfig, **factory: object):
        super().__init__()
        self.heads, self.cross = site.heads, site.cross
        self.published, self.query_node = config.mode == "published", config.query_node
        # Without queries the graph is square: rows and columns are the values.
        self.reads_q = self.published or site.cross or config.decode_graph == "released"
        channels = node_channels(site, width, config)
        bottleneck = width // config.r if self.published else channels * site.heads
        self.down = nn.Linear(width, bottleneck, **factory)
        self.gate = None if self.published else nn.Linear(width, bottleneck, **factory)
        self.up = nn.Linear(bottleneck, width, **factory)
        self.graph = Propagation(config, site.cross, channels, site.layer + 1, **factory)
        reset(self)

    def joins(self, x: Tensor, seen: Observation) -> bool:
        """Whether `plus` may compute the output of this adapter for the input `x` of the sublayer's last module."""
        if self.published or not is_eager(self, x, self.up.weight.dtype):
            return False
        if any(is_watched(part) for part in (self.down, self.gate, self.up, self.graph, self)):
            return False
        return self.graph.joins(seen, x, self.down.out_features)

    def plus(self, onto: Onto, x: Tensor, seen: Observation, project: nn.Module) -> Tensor:
        """Where it `joins`: the attention output and the output of this adapter for it in one function.

        Args:
            onto: the attention output, or the map that makes it of `x`.
        """
        values = self.graph.pool(seen.values)
        queries = None if self._square(seen) else self._queries(seen.q)
        projection = plain_linear(project, values)
        if projection is None:
            values, queries = (t if t is None else project(t.contiguous()) for t in (values, queries))
        maps = Maps(*(tensor for part in (self.down, self.gate, self.up) for tensor in (part.weight, part.bias)))
        nodes, A = Nodes(values, queries, projection), self.graph.given(seen, x.dtype)
        return plus_branch(onto, x, A, nodes, maps, self.graph.trained, self.heads)

    def forward(self, h: Tensor, seen: Observation, project: Callable[[Tensor], Tensor]) -> Tensor:
        """Output of this adapter for the attention output `h`, (B, N, d).

        Args:
            seen: the forward of the attention module that gave `h`.
            project: its output projection W_o z + b_o.
        """
        square = self._square(seen)
        # contiguous, because Conv1D takes nothing else
        values = project(self.graph.pool(seen.values).contiguous())
        queries = None if square else project(self._queries(seen.q).contiguous())
        # In bf16 the powers of distances lose the gradient of p, in half eps is 0: all of the branch in float32, but
        # for the products with its own weights where `products` says so.
        with torch.autocast(h.device.type, enabled=False):
            dtype = self.up.weight.dtype
            g = self._nodes(values)
            f = g[..., g.shape[2] - h.shape[1] :, :] if square else self._nodes(queries)
            moved = self.graph(seen, f, g, square).transpose(1, 2).flatten(2)
            with self.multiplying(h):
                if self.published:
                    out = moved + self.up(F.relu(self.down(moved)))
                else:
                    out = self.up(F.gelu(self.gate(at_edge(h, dtype))) * moved)
        return out

    def _square(self, seen: Observation) -> bool:
        """Whether the nodes are the values alone, each both a row and a column."""
        return not self.reads_q or not (self.cross or self.published or seen.past)

    def _queries(self, q: Tensor) -> Tensor:
        if self.query_node == "zeros":
            return torch.zeros_like(q)
        return torch.randn_like(q) if self.query_node == "noise" else q

    def _nodes(self, projected: Tensor) -> Tensor:
        """(B, n, d) -> (B, H, n, b), in the dtype of the weights."""
        dtype = self.up.weight.dtype
        wide = projected
        if not self.published:
            with self.multiplying(projected):
                wide = self.down(at_edge(projected, dtype))
        wide = wide.to(dtype)
        return wide.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FFNBranch(Fusable, Multiplies):
    """up(relu(down(t))) of the input t of a feed-forward block, added to its output.

    Args:
        width: of the block's input; it ends in `out_width`.
    """

    def __init__(self, width: int, out_width: int, config: PAdapterConfig, **factory: object):
        super().__init__()
        self.down = nn.Linear(width, width // config.r2, **factory)
        self.up = nn.Linear(width // config.r2, out_width, **factory)
        reset(self)

    def joins(self, x: Tensor, t: Tensor) -> bool:
        """Whether `forward` may compute the end of the block too, which reads x."""
        if is_watched(self.down) or is_watched(self.up):
            return False
        return t.dtype == x.dtype and is_eager(self, x, self.up.weight.dtype)

    def forward(self, t: Tensor, onto: Onto | None = None, x: Tensor | None = None) -> Tensor:
        """(..., width) -> (..., out_width).

        Args:
            onto: where it `joins`, what the result is added to: output of the block, or its last map.
            x: input of that map.
        """
        if onto is not None:
            return plus_relu(onto, x, t, *(Linear(m.weight, m.bias) for m in (self.down, self.up)))
        with torch.autocast(t.device.type, enabled=False), self.multiplying(t):
            return self.up(F.relu(self.down(at_edge(t, self.up.weight.dtype))))


class BranchLayer(nn.Module, SiteLayer):
    """The last leaf of a sublayer and the branches that adapters add there.

    What a branch has to see of the sublayer is noted by hooks on the modules before it, for the time of one forward.
    """

    adapter_layer_names = ("p_adapter",)

    def __init__(self, base: nn.Module, adapter_name: str, site: AttentionSite | FFNSite):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.p_adapter = nn.ModuleDict()
        self.site = site
        self._hooks: list[RemovableHandle] = []

    def add(self, adapter_name: str, branch: nn.Module, config: PAdapterConfig) -> None:
        """Add an adapter."""
        self.p_adapter[adapter_name] = branch
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the hooks are removed with the last one."""
        super().delete_adapter(adapter_name)
        if not self.p_adapter:
            self.detach()

    def detach(self) -> None:
        """Take the hooks off the modules before this one."""
        while self._hooks:
            self._hooks.pop().remove()

    def _branches(self) -> list[nn.Module]:
        return [] if self._frozen() else [self.p_adapter[n] for n in self.active_adapters if n in self.p_adapter]

    def _finish(self, around: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        close_for(self)

    def _seen(self) -> Any:
        seen = opened(self)
        if seen is None:
            raise BadInput(
                f"{self.site.path}: its last module was called alone, so p-adapter has seen nothing of what stands "
                "before it. Call the whole sublayer."
            )
        return seen

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what it adds depends on the attention map."""
        raise BadInput("p-adapter depends on the input and cannot be merged into weights. Keep it as an adapter.")


class AttentionLayer(BranchLayer):
    """The end of an attention sublayer.

    Args:
        attention: the module at the site's path.
    """

    def __init__(self, base: nn.Module, adapter_name: str, attention: nn.Module, site: AttentionSite):
        super().__init__(base, adapter_name, site)
        self._hooks = [
            attention.register_forward_pre_hook(self._begin, with_kwargs=True),
            attention.register_forward_hook(self._finish, always_call=True),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """The attention output with the branches of the active adapters."""
        branches = self._branches()
        if not branches:
            return self.base_layer(x)
        seen = self._seen()
        # Where the sublayer ends with its projection, that is what this layer wraps.
        project = self.base_layer if self.site.end == self.site.out.path else seen.project
        joins = len(branches) == 1 and branches[0].joins(x, seen)
        if joins and (linear := plain_linear(self.base_layer, x)) is not None:
            return branches[0].plus(linear, x, seen, project)
        h = self.base_layer(x)
        if joins and h.dtype == x.dtype:
            return branches[0].plus(h, x, seen, project)
        out = None
        for branch in branches:
            made = branch(h, seen, project)
            out = made if branch.published else (h if out is None else out) + made
        return out.to(h.dtype)

    def _begin(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        branches = self._branches()
        if not branches:
            return
        if getattr(kwargs.get("past_key_values"), "is_compileable", False):
            raise BadInput(f"{self.site.path}: p-adapter needs a cache that grows; it cannot use a static one.")
        open_for(self, observe(attention, self.site, any(branch.reads_q for branch in branches)))


class FFNLayer(BranchLayer):
    """The end of a feed-forward sublayer.

    Args:
        around: the module at the site's path, which may be the whole transformer layer.
        first: the widening projection, whose input the branch reads.
    """

    tokenwise = True

    def __init__(self, base: nn.Module, adapter_name: str, around: nn.Module, first: nn.Module, site: FFNSite):
        super().__init__(base, adapter_name, site)
        # Recomputation calls the forward of a transformer layer without its hooks, but those inside of it run.
        self._hooks = [
            base_layer(first).register_forward_pre_hook(self._note),
            around.register_forward_hook(self._finish, always_call=True),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output plus what the adapters make of its input."""
        branches = self._branches()
        if not branches:
            return self.base_layer(x)
        t = self._seen().t
        close_for(self)
        joins = len(branches) == 1 and branches[0].joins(x, t)
        if joins and (linear := plain_linear(self.base_layer, x)) is not None:
            return branches[0](t, linear, x)
        out = self.base_layer(x)
        if joins and out.dtype == x.dtype:
            return branches[0](t, out)
        return sum((branch(t) for branch in branches), out).to(out.dtype)

    def _note(self, first: nn.Module, args: tuple[Tensor, ...]) -> None:
        close_for(self)
        if self._branches():
            open_for(self, FFNInput(args[0]))


@dataclass
class FFNInput:
    """The input `t` of a feed-forward block, (B, N, d), from its first projection to its end."""

    t: Tensor

    def close(self) -> None:
        """Nothing to undo: this object holds tensors alone."""


def node_channels(site: AttentionSite, width: int, config: PAdapterConfig) -> int:
    """b, channels of a node in one head.

    Raises:
        BadInput: if the reduction does not divide the width of a head.
    """
    if config.mode == "published":
        if width % site.heads or width % config.r:
            raise BadInput(f"r: {site.path} is {width} wide with {site.heads} heads; r and heads must divide that.")
        return width // site.heads
    head = site.q.width // site.heads
    if head % config.r:
        raise BadInput(
            f"r: nodes are cut into heads, so r must divide the width of a head of {site.path}, {head}, and "
            f"{config.r} does not."
        )
    return head // config.r


def factory_of(module: nn.Module) -> dict[str, object]:
    """Device and dtype of trained parameters next to `module`: float32 for any base, except that float64 stays, which
    reference vectors need."""
    weight = base_layer(module).weight
    dtype = full_dtype(weight.dtype)
    return {"dtype": dtype, "device": weight.device}


def reset(branch: nn.Module) -> None:
    """Initialise as the released code does: all weights from a normal distribution (`up` too), biases zero."""
    for module in branch.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Propagation):
            module.reset()
