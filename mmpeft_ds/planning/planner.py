"""Plan of a run on given machines: what each configuration of ZeRO needs, which one to take, and what breaks first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmpeft_ds.data.order import ceil
from mmpeft_ds.engine.assembly.build import optim_groups
from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.engine.zero import gradients
from mmpeft_ds.engine.zero.config import merge
from mmpeft_ds.engine.zero.resident import GRADIENT, Layout, Rules, Tensors, resident
from mmpeft_ds.planning import cache, count, memory, microbatch, timing, traffic
from mmpeft_ds.planning.cluster import GIB, Cluster
from mmpeft_ds.planning.count import StepCount
from mmpeft_ds.planning.gathers import Gathers, gathers


@dataclass(frozen=True)
class Choice:
    """A configuration, and what it comes to.

    Attributes:
        name: of the shipped file without its ending, `recipe` for another one of the recipe's, and with `+qwZ` under
            quantised weights.
        zero: its `zero_optimization`.
        recompute: `engine.gradient_checkpointing`.
        parts: bytes of a GPU by part; host: of host memory for each of its ranks.
        cache: bytes of keys and values while evaluation generates text.
        seconds: of a step.
    """

    name: str
    zero: dict[str, Any]
    recompute: bool
    parts: dict[str, int]
    host: int
    cache: int
    traffic: traffic.Traffic
    seconds: timing.Seconds

    @property
    def refused(self) -> bool:
        """The trainer does not run it, since it rounds the base; shown for comparison."""
        return self.name.endswith("+qwZ")

    @property
    def total(self) -> int:
        """Bytes of a GPU in a step, or in evaluation where that needs more."""
        steady = sum(size for part, size in self.parts.items() if part != "activations")
        return steady + max(self.parts["activations"], self.cache)


@dataclass(frozen=True)
class Plan:
    """Configurations, and the recommended one, for a cluster.

    Attributes:
        micro: micro-batch of a rank; steps: micro-steps of an optimizer step; idle: ranks without a sample in each.
        counts: of a micro-step without and with recomputation.
        recommended: the fastest choice that fits; None if none does.
        limits: rank count at which something breaks, in words -> number; 0: never.
    """

    cluster: Cluster
    resolved: Resolved
    tensors: tuple[Tensors, ...]
    micro: microbatch.Size
    steps: int
    idle: int
    counts: dict[bool, StepCount]
    choices: list[Choice]
    recommended: Choice | None
    limits: dict[str, int]


def make(
    resolved: Resolved,
    configs: dict[str, dict[str, Any]],
    cluster: Cluster,
    filling: microbatch.Filling,
    planner: Planner | None = None,
) -> Plan:
    """Count the recipe's step and lay it out on the cluster.

    Args:
        configs: name -> `zero_optimization` of each configuration to look at.
        planner: with counts of an earlier plan of this recipe.

    Raises:
        BadInput: a recipe that cannot be planned.
    """
    recipe = resolved.recipe
    planner = planner or Planner(resolved, filling)
    micro, steps = planner.micro_batches(cluster.ranks)
    counts = planner.counts(micro, cluster.ranks)
    choices = [
        planner.choice(name, zero, cluster, counts[recompute], recompute)
        for recompute in counts
        for name, zero in fitting(configs, cluster)
    ]
    recommended = recommend(choices, cluster, recipe.engine.gradient_checkpointing)
    return Plan(
        cluster, resolved, planner.tensors, micro, steps, max(0, cluster.ranks - planner.slots), counts, choices,
        recommended, planner.limits(recommended or min(choices, key=lambda c: c.total), cluster),
    )  # fmt: skip


def micro_samples(slots: int, ranks: int, accumulation: int) -> int:
    """Samples of a rank in a micro-step, as `data.order.micro_slots` gives them."""
    return ceil(ceil(slots, ranks), accumulation)


def fitting(configs: dict[str, dict[str, Any]], cluster: Cluster) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configurations that mean something on this cluster, and quantised weights beside a second copy."""
    for name, zero in configs.items():
        if "zero_hpz_partition_size" in zero and cluster.nodes == 1:
            continue  # the copy would be the base itself
        yield name, zero
        if "zero_hpz_partition_size" in zero:
            yield f"{name}+qwZ", zero


def recommend(choices: Sequence[Choice], cluster: Cluster, recompute: bool) -> Choice | None:
    """The fastest of those that fit; with the recipe's own choice of recomputation where one of them does.

    Of equally fast ones, within a hundredth, the one that needs least memory.
    """
    room = cluster.budget - cluster.assumed.context * GIB
    able = [c for c in choices if c.total <= room and not c.refused]
    able = [c for c in able if c.recompute == recompute] or able
    if not able:
        return None
    best = min(c.seconds.apart for c in able)
    return min((c for c in able if c.seconds.apart <= 1.01 * best), key=lambda c: c.total)


class Planner:
    """Counts of a recipe, and what follows from them for any cluster."""

    def __init__(self, resolved: Resolved, filling: microbatch.Filling):
        self.resolved, self.filling = resolved, filling
        model = count.build(resolved)
        self.tensors, self.buffers = model.tensors, model.buffers
        trainables = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
        self.moments = optimizers.mean_moments(optim_groups(resolved, trainables), resolved.recipe.optim.name)
        self.groups = len(gradients.group_names(trainables)[0])
        self.cache = cache.of(resolved, model.module, filling)
        self._counted: dict[tuple[microbatch.Size, int], dict[bool, StepCount]] = {}
        self._gathered: dict[tuple[int, Rules, int], Gathers] = {}

    @property
    def slots(self) -> int:
        """Samples of all ranks in a micro-step; with `data.pack` in a step, of which micro-steps follow."""
        recipe = self.resolved.recipe
        return recipe.data.global_batch // (1 if recipe.data.pack else recipe.optim.accumulation)

    def micro_batches(self, ranks: int) -> tuple[microbatch.Size, int]:
        """The micro-batch of a rank, and how many of them make a step. With `data.pack` a full row, and as many as
        samples of the assumed length make."""
        recipe = self.resolved.recipe
        if not recipe.data.pack:
            accumulation = recipe.optim.accumulation
            return microbatch.Size(micro_samples(recipe.data.global_batch, ranks, accumulation)), accumulation
        of_rank = ceil(recipe.data.global_batch, ranks) * self.longest
        row = max(self.longest, min(recipe.data.pack, of_rank))
        return microbatch.Size(ceil(row, self.longest), row), ceil(of_rank, row)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of a sample, with `data.pack`."""
        return microbatch.tokens(self.resolved.backbone, self.filling)

    def counts(self, micro: microbatch.Size, ranks: int = 1) -> dict[bool, StepCount]:
        """Counts of a micro-step with a micro-batch of this size on each of so many ranks."""
        key = micro, ranks if count.joins_ranks(self.resolved) else 1
        if key not in self._counted:
            task, backbone = self.resolved.train[0].task, self.resolved.backbone
            batch = microbatch.fill(backbone, task, micro, self.filling)
            others = count.Others(key[1], self.filling.neighbours)
            self._counted[key] = count.with_both(self.resolved, batch, others)
        return self._counted[key]

    def choice(self, name: str, zero: dict[str, Any], cluster: Cluster, counted: StepCount, recompute: bool) -> Choice:
        """Memory, traffic and time of a configuration."""
        recipe, ranks = self.resolved.recipe, cluster.ranks
        trained = sum(t.numel for t in self.tensors if t.trained)
        merged = merge({"zero_optimization": zero}, recipe, ranks, trained)["zero_optimization"]
        layout = Layout.of(merged, ranks, cluster.gpus, name.endswith("+qwZ"))
        waiting = GRADIENT if layout.reduces_together(trained) else 0
        gathered = self.gathered(counted, layout.rules, waiting) if layout.stage == 3 else None
        accumulation = self.micro_batches(ranks)[1]
        vector = self.vector(ranks, accumulation)
        if gathered is None or ranks == 1:
            sent = traffic.below_3(self.tensors, layout, accumulation, vector)
        else:
            sent = traffic.at_3(self.tensors, layout, gathered, accumulation, vector)
        if ranks > 1:
            sent = traffic.joined(sent, counted.sent, counted.calls, accumulation)
        parts = resident(self.tensors, layout, self.moments) | {"buffers": self.buffers}
        left = gathered.left if gathered and ranks > 1 else 0
        parts |= memory.of_gradients(counted, self.tensors, layout, accumulation, left)
        parts |= memory.in_a_step(counted, gathered, ranks, parts["gradient buffers"])
        seconds = timing.estimate(counted, sent, layout, cluster, accumulation, recipe.engine.matmul == "tf32")
        host = memory.on_host(self.tensors, layout)
        generating = self.cache * cache.samples(self.resolved, ranks)
        return Choice(name, zero, recompute, parts, host, generating, sent, seconds)

    def gathered(self, counted: StepCount, rules: Rules, waiting: int) -> Gathers:
        """Gathers of a counted micro-step, worked out once; see `gathers`."""
        key = (id(counted), rules, waiting)
        if key not in self._gathered:
            self._gathered[key] = gathers(counted.visits, self.tensors, rules, counted.last, waiting)
        return self._gathered[key]

    def vector(self, ranks: int, micro_steps: int) -> int:
        """Bytes of the two vectors that the trainer itself sums in a step (`engine.step`)."""
        return 8 * (12 + 2 * micro_steps + self.groups + 5 * ranks)

    def limits(self, chosen: Choice, cluster: Cluster) -> dict[str, int]:
        """Rank counts at which this configuration breaks when nodes are added; 0 for nowhere below 2**20.

        Activations and operations of micro-batches in between follow from one and from this cluster's.
        """
        at_ranks = {"samples run out": self.slots + 1, "waiting for the network takes longer than computing": 0}
        nodes = 1
        while nodes * cluster.gpus <= 2**20:
            larger = dataclasses.replace(cluster, nodes=nodes)
            micro, _ = self.micro_batches(larger.ranks)
            apart = count.joins_ranks(self.resolved)  # heads on features, which are counted in no time
            known = apart or (micro, 1) in self._counted
            counted = self.counts(micro, larger.ranks)[chosen.recompute] if known else self.between(micro, chosen)
            seconds = self.choice(chosen.name, chosen.zero, larger, counted, chosen.recompute).seconds
            if seconds.network > seconds.compute:
                at_ranks["waiting for the network takes longer than computing"] = larger.ranks
                break
            nodes *= 2
        return at_ranks

    def between(self, micro: microbatch.Size, chosen: Choice) -> StepCount:
        """A count that is taken to be linear in the samples, or the tokens of a row, from one sample and from the
        largest count at hand."""
        least, _ = self.micro_batches(self.resolved.recipe.data.global_batch)
        low = self.counts(least)[chosen.recompute]
        most, _ = max(self._counted, key=lambda key: key[0].amount)
        high = self.counts(most)[chosen.recompute]
        share = (micro.amount - least.amount) / max(1, most.amount - least.amount)

        def mixed(a: int, b: int) -> int:
            return round(a + share * (b - a))

        flops = {dtype: mixed(number, high.flops[dtype]) for dtype, number in low.flops.items()}
        return dataclasses.replace(
            low, flops=flops, moved=mixed(low.moved, high.moved), peak=mixed(low.peak, high.peak)
        )
