"""A plan as numbers for machines, and as tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmpeft_ds.console import one_line
from mmpeft_ds.planning.cluster import GIB, Cluster
from mmpeft_ds.planning.planner import Choice, Plan

WIDTH = 118  # that the tables need
# Columns of the table -> parts of `Choice.parts`.
SUMS = {
    "frozen": ("frozen weights", "small weights kept whole", "buffers"),
    "hpZ copy": ("hpZ copy",),
    "trained": ("trained weights",),
    "optimiser": ("master copy", "optimiser"),
    "gradients": ("gradients", "gradient buffers"),
    "gathered": ("gathered weights",),
    "activations": ("activations",),
}


def as_dict(plan: Plan) -> dict[str, Any]:
    """All of a plan as a JSON-able mapping; bytes, seconds and counts without rounding."""
    recipe = plan.resolved.recipe
    return {
        "recipe": recipe.origin.path,
        "cluster": dataclasses.asdict(plan.cluster) | {"ranks": plan.cluster.ranks},
        "global_batch": recipe.data.global_batch,
        "micro_steps": plan.steps,
        "samples_per_micro_step": plan.micro.samples,
        "tokens_per_row": plan.micro.row,
        "idle_ranks": plan.idle,
        "parameters": sum(t.numel for t in plan.tensors),
        "trained_parameters": sum(t.numel for t in plan.tensors if t.trained),
        "counts": {
            "recomputed" if recompute else "kept": {
                name: value for name, value in vars(counted).items() if name not in ("visits", "last", "gradients")
            }
            for recompute, counted in plan.counts.items()
        },
        "choices": [_choice(choice, plan) for choice in plan.choices],
        "recommended": _choice(plan.recommended, plan) if plan.recommended else None,
        "limits": plan.limits,
    }


def _choice(choice: Choice, plan: Plan) -> dict[str, Any]:
    return {
        "name": choice.name,
        "zero_optimization": choice.zero,
        "gradient_checkpointing": choice.recompute,
        "refused": choice.refused,
        "bytes": choice.parts,
        "cache_bytes": choice.cache,
        "total_bytes": choice.total + round(plan.cluster.assumed.context * GIB),
        "fits": fits(choice, plan.cluster),
        "host_bytes_per_rank": choice.host,
        "received_in_groups": choice.traffic.near,
        "received_over_all_ranks": choice.traffic.wide,
        "over_pcie": choice.traffic.host,
        "collectives_in_groups": choice.traffic.near_calls,
        "collectives_over_all_ranks": choice.traffic.calls,
        "seconds": dataclasses.asdict(choice.seconds)
        | {"apart": choice.seconds.apart, "overlapped": choice.seconds.overlapped},
    }


def fits(choice: Choice, cluster: Cluster) -> bool:
    """Whether the step fits into a GPU."""
    return choice.total + cluster.assumed.context * GIB <= cluster.budget


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the plan."""
    console = console or Console(width=max(WIDTH, Console().width))
    recipe, cluster = plan.resolved.recipe, plan.cluster
    own = recipe.engine.gradient_checkpointing
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus}"
    row = f", as one row of {plan.micro.row:,} tokens," if plan.micro.row else ""
    console.print(
        f"{cluster.ranks:,} GPUs ({nodes}, {cluster.hbm:g} GiB each); {plan.micro.samples} samples per GPU{row} in "
        f"each of {plan.steps} micro-steps",
        highlight=False,
    )
    for recompute in plan.counts:
        note = "" if recompute == own else ", which this recipe does not do"
        title = f"Memory of a GPU in GiB, activations {'recomputed' if recompute else 'kept'}{note}"
        console.print(_memory(title, [c for c in plan.choices if c.recompute == recompute], cluster))
    console.print(_activations(plan))
    mine = [c for c in plan.choices if c.recompute == own]
    console.print(_traffic(mine))
    console.print(_time(mine, cluster))
    for line in (*verdict(plan), *assumptions(plan)):
        console.print(escape(line), highlight=False)


def verdict(plan: Plan) -> list[str]:
    """Recommended configuration, and the limits."""
    recipe, cluster = plan.resolved.recipe, plan.cluster
    lines = []
    if plan.idle:
        slots = cluster.ranks - plan.idle
        lines.append(
            f"Samples: a micro-step has {slots:,} of them for {cluster.ranks:,} GPUs, so {plan.idle:,} compute on "
            f"padding. Use {max(1, slots // cluster.gpus)} nodes, or a larger data.global_batch."
        )
    chosen = plan.recommended
    if chosen is None:
        least = min((c for c in plan.choices if not c.refused), key=lambda c: c.total)
        need = (least.total / GIB + cluster.assumed.context) / cluster.assumed.usable
        less = "Lower data.pack" if plan.micro.row else "Raise optim.accumulation"
        lines.append(
            f"Memory: nothing fits into {cluster.hbm:g} GiB. The least is {least.name} with {need:.1f} GiB"
            f"{', activations recomputed' if least.recompute else ''}. {less}, or use more GPUs."
        )
    else:
        words = [] if chosen.recompute == recipe.engine.gradient_checkpointing else [
            f"--set engine.gradient_checkpointing={str(chosen.recompute).lower()}"
        ]  # fmt: skip
        lines.append(
            f"Recommended: {chosen.name}{' with ' if words else ''}{' '.join(words)}, the fastest that fits "
            f"({(chosen.total / GIB + cluster.assumed.context):.1f} GiB, about {chosen.seconds.apart:.3g} s a step, "
            f"{recipe.data.global_batch / chosen.seconds.apart:.3g} samples/s)."
        )
    name = chosen.name if chosen else min(plan.choices, key=lambda c: c.total).name
    for what, ranks in plan.limits.items():
        where = f"from {ranks:,} GPUs on" if ranks else "nowhere below a million GPUs"
        lines.append(f"With more nodes under {name}: {what} {where}.")
    return lines


def assumptions(plan: Plan) -> list[str]:
    """Assumptions behind the figures."""
    c, a, rates = plan.cluster, plan.cluster.assumed, plan.cluster.rates
    return [
        "Evaluation: keys and values of generation, in place of activations. In all: the larger of the two, "
        f"the other parts, and {a.context:g} GiB for CUDA and NCCL.",
        "Counted: activations, FLOPs, and what ZeRO-3 gathers, from the model's own forward and backward without "
        "numbers, with every text at its longest. Bytes of weights and collectives follow from shapes.",
        f"Assumed, not measured: {c.card} with {rates.half:g} TFLOP/s in bfloat16, {rates.tf32:g} in TF32, "
        f"{rates.single:g} in float32, {rates.memory:g} TB/s, of which {a.efficiency:.0%} and {a.bandwidth:.0%} are "
        f"reached; {c.link:g} GB/s inside a node, {c.nic:g} GB/s from a node to the others, {a.pcie:g} GB/s from host "
        f"memory, collectives at {a.network:.0%} of it; {a.hop:g} us of latency for each further node and "
        f"{a.near_hop:g} us for each further GPU; {1 - a.usable:.0%} of the memory lost in gaps.",
    ]


def _memory(title: str, choices: list[Choice], cluster: Cluster) -> Table:
    columns = {name: [sum(c.parts.get(part, 0) for part in parts) for c in choices] for name, parts in SUMS.items()}
    columns |= {
        "evaluation": [c.cache for c in choices],
        "host a node": [c.host * cluster.gpus for c in choices],
    }
    shown = {name: sizes for name, sizes in columns.items() if any(sizes)}
    table = Table(title=one_line(title), title_justify="left")
    for column in ("", *shown, "in all"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for i, c in enumerate(choices):
        whole = f"{c.total / GIB + cluster.assumed.context:.2f}{'' if fits(c, cluster) else ' too much'}"
        table.add_row(c.name, *(_gib(sizes[i]) for sizes in shown.values()), whole)
    return table


def _activations(plan: Plan) -> Table:
    table = Table(title=one_line("Activations of a micro-step in GiB"), title_justify="left")
    for column in ("", "at most", "kept for backward", "output layer and loss add", "TFLOP"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for recompute, c in plan.counts.items():
        flops = sum(c.flops.values()) / 1e12
        name = "recomputed" if recompute else "kept"
        table.add_row(name, _gib(c.peak), _gib(c.kept), _gib(c.head), f"{flops:.4g}")
    return table


def _traffic(choices: list[Choice]) -> Table:
    table = Table(title=one_line("Received by a GPU in a step, GiB"), title_justify="left")
    for column in ("", "in groups inside nodes", "gathers over all", "reductions over all", "host memory", "calls"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for c in choices:
        gathers = c.traffic.wide.get("all_gather", 0)
        near, reduced = sum(c.traffic.near.values()), sum(c.traffic.wide.values()) - gathers
        table.add_row(
            c.name, *map(_gib, (near, gathers, reduced, c.traffic.host)), f"{c.traffic.near_calls + c.traffic.calls:,}"
        )
    return table


def _time(choices: list[Choice], cluster: Cluster) -> Table:
    table = Table(title=one_line("Estimated seconds of a step"), title_justify="left")
    for column in ("", "computing", "inside nodes", "between nodes", "latency", "host", "one by one", "overlapped"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for c in choices:
        s = c.seconds
        name = f"{c.name} (refused)" if c.refused else c.name
        name += "" if fits(c, cluster) else " (too much memory)"
        values = (s.compute, s.near, s.wide, s.latency, s.host, s.apart, s.overlapped)
        table.add_row(name, *(f"{v:.3g}" for v in values))
    return table


def _gib(size: float) -> str:
    gib = size / GIB
    return "-" if not size else f"{gib:.2f}" if gib >= 0.01 else f"{gib:.1g}"
