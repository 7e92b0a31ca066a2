"""Plan of a run, computed on the meta device: data, trainables by kind, steps, memory per rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.common import quantised
from mmpeft_ds.console import one_line
from mmpeft_ds.data.assumed import is_assumed
from mmpeft_ds.data.order import steps_of
from mmpeft_ds.engine import checkpoint_files, ewc, frozen_images, pack_forecast, rundir, text_check
from mmpeft_ds.engine.assembly import start_from
from mmpeft_ds.engine.assembly.build import optim_groups
from mmpeft_ds.engine.assembly.checks import check_schedule
from mmpeft_ds.engine.assembly.idle import idle_notes
from mmpeft_ds.engine.assembly.resolve import Resolved, attach, check_new
from mmpeft_ds.engine.identities import identities
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.engine.zero.config import merge
from mmpeft_ds.engine.zero.resident import Layout, Tensors, resident

ZERO_1 = {"zero_optimization": {"stage": 1}}
KINDS = ("peft", "norm", "bias", "head")
MACHINE = 8  # ranks on a machine, which "auto" of zero_hpz_partition_size reads at the start of a run


def make(resolved: Resolved, ranks: Sequence[int] = ()) -> dict[str, Any]:
    """Numbers of the run as a JSON-able mapping. Allocates no weights and needs no launcher.

    Args:
        ranks: further numbers of ranks to work out the memory for.

    Raises:
        BadInput: what a start would refuse.
    """
    recipe = resolved.recipe
    ewc.check(recipe)
    model = on_meta(resolved)
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = optim_groups(resolved, trainables)  # which refuses patterns that fit nothing
    steps_per_epoch, sources = 0, []
    for source in resolved.train:
        samples = source.samples
        steps = steps_of(samples, recipe.data.global_batch, recipe.data.last_batch)
        steps_per_epoch += steps
        sources.append(_source_row(source, samples, steps))
    validation = [_source_row(s, s.samples, 0) for s in resolved.validation]
    stage = resolved.ds_config.get("zero_optimization", {}).get("stage", 0)
    asked_ranks = max([int(os.environ.get("WORLD_SIZE") or 1), *ranks])
    ranks = sorted({1, 2, 8, 64, int(os.environ.get("WORLD_SIZE") or 1), *ranks})
    sizes = Sizes.of(model, optimizers.mean_moments(groups, recipe.optim.name))
    total_steps = recipe.optim.max_steps or steps_per_epoch * recipe.optim.epochs
    if not resolved.method_options.gradient_free:
        check_schedule(recipe, total_steps, steps_per_epoch)
    asked = 0 if resolved.method_options.gradient_free else total_steps
    texts, text_notes = _texts(resolved)
    packing = pack_forecast.make(resolved, ranks)
    kept = frozen_images.forecast(resolved, model)
    there = (recipe.run_dir, recipes.to_dict(recipe), asked, recipe.engine.patience, identities(resolved))
    return {
        "backbone": recipe.backbone["name"],
        "method": recipe.method["name"],
        "labels": len(resolved.labels or []),
        "sources": sources,
        "validation": validation,
        "notes": resolved.notes,
        "texts": texts,
        "packing": packing,
        "cache_frozen": kept,
        "remarks": [
            *text_notes,
            *([frozen_images.words(kept)] if kept else []),
            *pack_forecast.remarks(resolved, packing),
            *resolved.remarks,
            *idle_notes(resolved, asked_ranks),
            *rundir.preview(*there),
        ],
        "global_batch": recipe.data.global_batch,
        "accumulation": recipe.optim.accumulation,
        "pack": recipe.data.pack,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
        "trainable_by_kind": trainable_by_kind(resolved, model),
        "trainable_parameters": sizes.trained,
        "total_parameters": sizes.total,
        "zero_stage": stage,
        "dtype": recipe.engine.dtype,
        "quantise": recipe.backbone.get("quantise", "none"),
        "quantised": quantised_bytes(model),
        "bytes_per_rank": {n: zero_bytes(sizes, resolved.ds_config, recipe, n) for n in ranks},
        "bytes_per_rank_zero1": {n: zero_bytes(sizes, ZERO_1, recipe, n) for n in ranks},
    }


def on_meta(resolved: Resolved) -> PeftModel:
    """The model of a run, without weights. Raises BadInput for what a start would refuse, of a new run all of it."""
    with torch.device("meta"):
        model = attach(resolved, resolved.backbone.build(on_meta=True))
    if not checkpoint_files.listing(Path(resolved.recipe.run_dir) / "checkpoints"):
        check_new(resolved, model)
        if resolved.recipe.start_from:
            start_from.read(resolved, model)
    return model


def quantised_bytes(model: nn.Module) -> dict[str, int]:
    """The quantised layers of a model: their number, their weights, and their bytes with scales."""
    weights = [module.weight for module in model.modules() if quantised.is_quantised(module)]
    sums = {"weights": sum(map(quantised.numel, weights)), "bytes": sum(map(quantised.nbytes, weights))}
    return {"layers": len(weights), **sums}


def _texts(resolved: Resolved) -> tuple[list[dict[str, Any]], list[str]]:
    """Counts of texts that would be cut, hold control tokens or cannot be read, in a part of each source; and lines
    for the user."""
    rows, lines = [], []
    for source, check in text_check.check_texts(
        resolved, [*resolved.train, *resolved.validation], text_check.LOOKED_AT
    ):
        rows.append(
            {
                "dir": source.options.dir,
                "split": source.options.split,
                "task": source.options.task["name"],
                "looked_at": check.samples,
                "cut_texts": check.counts.cut,
                "control_tokens": check.counts.control,
                "refused": check.refused,
            }
        )
        line = check.line(resolved.backbone, source)
        lines += [line] if line and line not in lines else []
    return rows, lines


def trainable_by_kind(resolved: Resolved, model: nn.Module) -> dict[str, int]:
    """Trainable elements by kind; what the method does not know as `norm`, `bias` or `head` is `peft`."""
    numel = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    kinds = resolved.method.kinds(list(numel))
    return {kind: sum(numel[name] for name in kinds.get(kind, [])) for kind in KINDS}


@dataclass(frozen=True)
class Sizes:
    """Sizes from which the memory of a rank follows.

    Attributes:
        tensors: parameters of the model, each once.
        largest_module: elements of the parameters that one module holds directly.
        moments: of the optimiser, for each trained element on average.
    """

    tensors: tuple[Tensors, ...]
    largest_module: int
    moments: float

    @classmethod
    def of(cls, model: nn.Module, moments: float) -> Sizes:
        """Sizes of a model, which may be on the meta device."""
        tensors = tuple(Tensors.of(p) for p in model.parameters())
        largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
        return cls(tensors, largest, moments)

    @property
    def trained(self) -> int:
        """Elements that train."""
        return sum(t.numel for t in self.tensors if t.trained)

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(t.numel for t in self.tensors)


def zero_bytes(sizes: Sizes, ds_config: dict[str, Any], recipe: recipes.Recipe, ranks: int) -> int:
    """Bytes of a rank for weights, gradients and optimiser, and for what stage 3 gathers; activations come on top.

    What is gathered at the worst moment is taken to be all that `max_live_parameters` allows; `launchers/plan.py`
    follows the modules in its place.
    """
    zero = merge(ds_config, recipe, ranks, sizes.trained)["zero_optimization"]
    layout = Layout.of(zero, ranks, MACHINE)
    parts = resident(sizes.tensors, layout, sizes.moments)
    return sum(parts.values()) + _gathered(sizes, layout, parts.get("small weights kept whole", 0))


def _gathered(sizes: Sizes, layout: Layout, kept: int) -> int:
    """Bytes of frozen weights that are gathered besides those that are `kept` whole. A rank alone gathers nothing."""
    if layout.stage < 3 or layout.ranks == 1:
        return 0
    frozen = sum(t.numel for t in sizes.tensors if not t.trained)
    window = sizes.largest_module + layout.rules.prefetch_bucket_size
    live = min(frozen, max(window, layout.rules.max_live_parameters))
    return max(0, live * max((t.width for t in sizes.tensors if not t.trained), default=0) - kept)


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the plan as tables."""
    console = console or Console()
    rows = [*report["sources"], *report["validation"]]
    table = Table(title="Data", title_justify="left")
    numbers = [n for n in ("samples", "images", "texts", "steps") if any(row[n] for row in rows)]
    for column in ("data set", "split", "task", *numbers):
        shown = "steps/epoch" if column == "steps" else column
        table.add_column(shown, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        counts = {n: f"{row[n]:,}" if row[n] else "-" for n in numbers}
        counts["samples"] += " assumed" if row["assumed"] else ""
        table.add_row(row["dir"], row["split"], row["task"], *counts.values())
    console.print(table)
    for note in (*report["notes"], *report["remarks"]):
        console.print(f"[b]Note[/b] {escape(note)}", highlight=False)
    console.print(f"[b]{report['method']}[/b] on [b]{report['backbone']}[/b]")
    for name, value in _facts(report).items():
        console.print(f"  {name:<11} {value}", highlight=False)
    for table in pack_forecast.tables(report["packing"], report["pack"]):
        console.print(table)
    table = Table(title=one_line(f"Memory per rank, {report['dtype']}, no activations"), title_justify="left")
    columns = {f"ZeRO-{report['zero_stage']} (this recipe)": report["bytes_per_rank"]}
    if report["zero_stage"] != 1:
        columns["ZeRO-1"] = report["bytes_per_rank_zero1"]
    for column in ("ranks", *columns):
        table.add_column(column, justify="right")
    for n in report["bytes_per_rank"]:
        table.add_row(str(n), *(size_text(sizes[n]) for sizes in columns.values()))
    console.print(table)


def _facts(report: dict[str, Any]) -> dict[str, str]:
    """Facts about the training, one line each."""
    trained, total = report["trainable_parameters"], report["total_parameters"]
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report["trainable_by_kind"].items() if count)
    assumed = any(row["assumed"] for row in report["sources"])
    parts = f" in {report['accumulation']} micro-steps" if report["accumulation"] > 1 else ""
    samples, slots = report["global_batch"], report["global_batch"] // report["accumulation"]
    facts = {
        "trained": f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)",
        "of these": kinds,
        "length": f"{report['total_steps']:,} steps of {samples:,} samples{parts}, for at most {slots:,} ranks",
        "quantised": _quantised(report),
        "labels": f"{report['labels']:,}{' assumed' if assumed else ''}" if report["labels"] else "",
    }
    return {name: value for name, value in facts.items() if value}


def _quantised(report: dict[str, Any]) -> str:
    sums = report["quantised"]
    if not sums["layers"]:
        return ""
    bits = 8 * sums["bytes"] / sums["weights"]
    size = f"{size_text(sums['bytes'])}, {bits:.2f} bits a weight with scales"
    return f"{report['quantise']}: {sums['layers']:,} layers, {size}"


def _source_row(source: Any, samples: int, steps: int) -> dict[str, Any]:
    fields = source.manifest.fields.get(source.options.split, {})
    texts = fields.get("questions", {}).get("mean")  # mean length of the list of questions
    return {
        "dir": source.options.dir,
        "split": source.options.split,
        "task": source.options.task["name"],
        "samples": samples,
        "images": round(samples * fields["images"]["mean"]) if "images" in fields else None,
        "texts": round(samples * texts) if texts else None,
        "steps": steps,
        "assumed": is_assumed(source.manifest),
    }


def size_text(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
