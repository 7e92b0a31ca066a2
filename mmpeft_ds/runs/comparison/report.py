"""Table and plot of a comparison, from the result files of its rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpeft_ds.files import replacing, write_atomic

TABLE, PLOT = "table.md", "pareto.png"
# what is small where it is good: label of the axis, divisor
COSTS = {
    "memory": ("peak memory, MiB", 1 << 20),
    "time": ("seconds per step, median", 1),
    "bytes": ("adapter file, KiB", 1 << 10),
}


def write(out: Path, refused: dict[str, str]) -> str:
    """Write OUT/table.md and OUT/pareto.png of all rows that are done, and return the table.

    Args:
        refused: row -> why it does not fit the backbone.
    """
    rows = summarise(read(out))
    text = table(rows, refused)
    write_atomic(out / TABLE, text)
    plot(out / PLOT, rows)
    return text


def read(out: Path) -> list[dict[str, Any]]:
    """The result files of a comparison, in the order in which they were made."""
    results = [json.loads(path.read_text("utf-8")) for path in (out / "results").glob("*.json")]
    return sorted(results, key=lambda r: (r["run_info"]["created_at"], r["run_info"]["experiment_name"]))


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One mapping a row, over its seeds: `scores` and `forgetting` of each, and means of what it cost."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["train_info"]["status"] == "success":
            rows.setdefault(result["run_info"]["row"], []).append(result)
    return [_summary(name, seeds) for name, seeds in rows.items()]


def _summary(name: str, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    trains, lasts = [r["train_info"] for r in seeds], [r["train_info"]["metrics"][-1] for r in seeds]
    return {
        "name": name,
        "width": trains[0]["budget"]["width"],
        "within": trains[0]["budget"]["within"],
        "budget": trains[0]["budget"],
        "method_parameters": trains[0]["num_method_params"],
        "parameters": trains[0]["num_trainable_params"],
        "metric": f"{lasts[0]['metric']} ({lasts[0]['split']})",
        "scores": [last["test accuracy"] for last in lasts],
        "scored": "; ".join(dict.fromkeys(last["scored"] for last in lasts if last.get("scored"))),
        "loss": statistics.mean(last["train loss"] for last in lasts),
        "forgetting": [last["forgetting"] for last in lasts if "forgetting" in last],
        "second": next((last["second task"] for last in lasts if "second task" in last), None),
        "memory": statistics.mean(t["accelerator_memory_max"] for t in trains),
        "time": statistics.mean(last["step time"] for last in lasts),
        "train_time": statistics.mean(t["train_time"] for t in trains),
        "bytes": statistics.mean(t["file_size"] for t in trains),
    }


def table(rows: Sequence[dict[str, Any]], refused: dict[str, str]) -> str:
    """Markdown: one line per row, best score first; below it what the columns mean and what does not fit."""
    if not rows:
        return "No row is done yet.\n"
    budget, second = rows[0]["budget"], next((row["second"] for row in rows if row["second"]), None)
    front = pareto(rows, "bytes")
    columns = ["row", "width", "trained by the method", "with the head", rows[0]["metric"], "scored", "training loss"]
    columns += ["forgetting", "peak memory, MiB", "s per step", "adapter, KiB"]
    lines = [_line(columns), "|" + "---|" * len(columns)]
    for row in sorted(rows, key=lambda r: -statistics.mean(r["scores"])):
        name = f"**{row['name']}**" if row["name"] in front else row["name"]
        counted = f"{row['method_parameters']:,}" + ("" if row["within"] else " (off the budget)")
        cells = [name, row["width"] or "-", counted, f"{row['parameters']:,}", _spread(row["scores"], ".4f")]
        cells += [
            row["scored"] or "-",
            f"{row['loss']:.3f}",
            _spread(row["forgetting"], "+.3f"),
            f"{row['memory'] / COSTS['memory'][1]:,.0f}",
        ]
        lines.append(_line([*cells, f"{row['time']:.2f}", f"{row['bytes'] / COSTS['bytes'][1]:,.0f}"]))
    notes = [
        f"Budget: {budget['parameters']:,} parameters of the method, within {budget['tolerance']:.0%}. Bold: no other "
        "row scores more with a smaller adapter."
    ]
    if second:
        before = ", ".join(f"{key} {value:.3f}" for key, value in second["before"].items())
        notes.append(
            f"Forgetting: loss on {second['samples']:,} samples of {second['data']} ({second['task']}) with the "
            f"adapter less that without; without: {before}."
        )
    notes += [f"Not on this backbone: `{name}`: {why}" for name, why in refused.items()]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def pareto(rows: Sequence[dict[str, Any]], cost: str) -> set[str]:
    """Names of the rows that no other row beats: at least as good in score and cost, and better in one."""

    def beaten(row: dict[str, Any]) -> bool:
        own = (statistics.mean(row["scores"]), -row[cost])
        others = ((statistics.mean(r["scores"]), -r[cost]) for r in rows)
        return any(o != own and o[0] >= own[0] and o[1] >= own[1] for o in others)

    return {row["name"] for row in rows if not beaten(row)}


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Score over each of `COSTS`, a panel each, with the front of rows that no other beats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not rows:
        return
    figure, panels = pyplot.subplots(1, len(COSTS), figsize=(6 * len(COSTS), 5.5), sharey=True)
    colors = pyplot.get_cmap("tab20").colors
    for axes, (cost, (label, divisor)) in zip(panels, COSTS.items(), strict=True):
        for number, row in enumerate(rows):
            x, y = row[cost] / divisor, statistics.mean(row["scores"])
            style = {"color": colors[number % len(colors)], "marker": "o" if number < len(colors) else "s"}
            axes.errorbar([x], [y], _deviation(row["scores"]), capsize=2, linestyle="", label=row["name"], **style)
        front = sorted((r for r in rows if r["name"] in pareto(rows, cost)), key=lambda r: r[cost])
        scores = [statistics.mean(r["scores"]) for r in front]
        axes.step([r[cost] / divisor for r in front], scores, where="post", color="grey", linewidth=1, zorder=0)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(rows[0]["metric"])
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and with several seeds their standard deviation; `-` where there is none."""
    if not values:
        return "-"
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {_deviation(values):.3f}" if len(values) > 1 else mean


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
