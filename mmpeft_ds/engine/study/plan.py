"""Plan of a study, computed on the meta device: trained parameters and steps per member, and the memory of all."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmpeft_ds import recipe as recipes
from mmpeft_ds.console import one_line
from mmpeft_ds.data.order import steps_of
from mmpeft_ds.engine import ewc, frozen_images, rundir
from mmpeft_ds.engine.assembly.build import optim_groups
from mmpeft_ds.engine.assembly.checks import check_schedule
from mmpeft_ds.engine.assembly.resolve import Resolved, resolve
from mmpeft_ds.engine.identities import identities
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.engine.plan import MACHINE, Sizes, on_meta, size_text
from mmpeft_ds.engine.study.checks import check, check_directory
from mmpeft_ds.engine.zero.config import merge
from mmpeft_ds.engine.zero.resident import Layout, resident
from mmpeft_ds.recipe.study import Study


def make(study: Study) -> dict[str, Any]:
    """Numbers of a study as a JSON-able mapping. Allocates no weights and needs no launcher.

    Raises:
        BadInput: for everything that training would refuse.
    """
    members = {name: resolve(recipe) for name, recipe in study.members.items()}
    check(study, members)
    check_directory(study.run_dir)
    ranks = sorted({1, 2, 8, 64, int(os.environ.get("WORLD_SIZE") or 1)})
    rows = [_member(name, resolved, study.settings[name], ranks) for name, resolved in members.items()]
    notes = [note for resolved in members.values() for note in (*resolved.notes, *resolved.remarks)]
    base = max(row.pop("frozen_bytes") for row in rows)
    return {
        "members": rows,
        "notes": list(dict.fromkeys([*notes, *(note for row in rows for note in row.pop("notes"))])),
        "zero_stage": next(iter(members.values())).ds_config["zero_optimization"].get("stage", 0),
        "base_bytes": base,
        "bytes_per_rank": {n: base + sum(row["bytes_per_rank"][n] for row in rows) for n in ranks},
    }


def _member(name: str, resolved: Resolved, settings: dict[str, Any], ranks: list[int]) -> dict[str, Any]:
    """Trained parameters and steps of a member, and the bytes of what it trains, without the base."""
    recipe = resolved.recipe
    ewc.check(recipe)
    frozen_images.check(resolved)
    model = on_meta(resolved)
    groups = optim_groups(resolved, {n: p for n, p in model.named_parameters() if p.requires_grad})
    steps = sum(steps_of(s.samples, recipe.data.global_batch, recipe.data.last_batch) for s in resolved.train)
    total = recipe.optim.max_steps or steps * recipe.optim.epochs
    check_schedule(recipe, total, steps)
    sizes = Sizes.of(model, optimizers.mean_moments(groups, recipe.optim.name))
    trained = [tensor for tensor in sizes.tensors if tensor.trained]
    of_rank = {}
    for n in ranks:
        zero = merge(resolved.ds_config, recipe, n, sizes.trained)["zero_optimization"]
        of_rank[n] = sum(resident(trained, Layout.of(zero, n, MACHINE), sizes.moments).values())
    there = (recipe.run_dir, recipes.to_dict(recipe), total, recipe.engine.patience, identities(resolved))
    return {
        "name": name,
        "settings": settings,
        "method": recipe.method["name"],
        "trainable_parameters": sizes.trained,
        "total_steps": total,
        "frozen_bytes": round(sum(t.numel * t.width for t in sizes.tensors if not t.trained)),
        "bytes_per_rank": of_rank,
        "notes": rundir.preview(*there),
    }


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the plan as tables."""
    console = console or Console()
    table = Table(title="Members", title_justify="left")
    for column in ("name", "method", "settings"):
        table.add_column(column, overflow="fold")
    for column in ("trained", "steps", "1 rank"):
        table.add_column(column, justify="right")
    for row in report["members"]:
        settings = [f"{k} {v}" for k, v in row["settings"].items() if v is not None and k != "method.name"]
        numbers = [f"{row['trainable_parameters']:,}", f"{row['total_steps']:,}", size_text(row["bytes_per_rank"][1])]
        table.add_row(row["name"], row["method"], ", ".join(settings), *numbers)
    console.print(table)
    for note in report["notes"]:
        console.print(f"[b]Note[/b] {escape(note)}", highlight=False)
    title = f"Memory per rank at ZeRO-{report['zero_stage']}, no activations"
    table = Table(title=one_line(title), title_justify="left")
    count = len(report["members"])
    for column in ("ranks", "base, once", f"{count} adapters", "together", "as separate runs"):
        table.add_column(column, justify="right")
    base = report["base_bytes"]
    for n, together in report["bytes_per_rank"].items():
        parts = (base, together - base, together, together + (count - 1) * base)
        table.add_row(str(n), *map(size_text, parts))
    console.print(table)
