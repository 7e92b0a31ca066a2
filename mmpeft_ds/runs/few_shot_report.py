"""Reports of a few-shot study: results.md, results.csv and a plot of accuracy over shots."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmpeft_ds.files import replacing, write_atomic

METRIC = "accuracy"
CELL_KEYS = ("method", "reads", "half", "shots", "seed", "train_samples", "trainable_parameters", "steps")


def write(out: Path, results: list[dict[str, Any]]) -> str:
    """Write the three files into `out` and return the Markdown.

    Args:
        results: one mapping per cell, as `runs.few_shot` writes them, in the order of the table.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(results)
    write_atomic(out / "results.md", text)
    write_atomic(out / "results.csv", as_csv(results))
    plot(out / "results.png", results)
    return text


def markdown(results: list[dict[str, Any]]) -> str:
    """One table per test set: a row per method, a column per number of shots, mean and deviation over seeds in %."""
    whole = [r for r in results if r["half"] == "all"]
    shots = sorted({r["shots"] for r in results})
    parts = []
    for test in _tests(whole):
        lines = [f"### {test} ({_samples(whole, test)})", ""]
        lines += _table(["method", "reads", *(f"{s}-shot" for s in shots), "trained at most"])
        for name, rows in _by_method(whole).items():
            cells = [_shown(_scores(rows, test, s)) for s in shots]
            if rows[0]["once"]:
                cells = [next(c for c in cells if c)] * len(shots)
            trained = max(r["trainable_parameters"] for r in rows)
            lines.append(_row([name, rows[0]["reads"], *cells, f"{trained:,}" if trained else "-"]))
        majority = _majority(whole, test)
        if majority is not None:
            lines.append(_row(["most frequent class", "-", *[f"{100 * majority:.1f}"] * len(shots), "-"]))
        parts.append("\n".join(lines))
    halves = [r for r in results if r["half"] != "all"]
    for test in dict.fromkeys(name.rsplit(" ", 1)[0] for name in _tests(halves)):
        parts.append(_base_to_new(halves, test))
    return "\n\n".join(parts) + "\n"


def as_csv(results: list[dict[str, Any]]) -> str:
    """One line per cell and test set, with all metrics."""
    metrics = sorted({name for r in results for scores in r["tests"].values() for name in scores})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*CELL_KEYS, "test", *metrics])
    for r in results:
        for test, scores in r["tests"].items():
            writer.writerow([*(r[key] for key in CELL_KEYS), test, *(scores.get(m, "") for m in metrics)])
    return buffer.getvalue()


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """Plot accuracy over shots: one panel per test set, error bars of one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = [r for r in results if r["half"] == "all"]
    tests = _tests(whole)
    if not tests:
        return
    shots = sorted({r["shots"] for r in whole})
    figure, panels = pyplot.subplots(1, len(tests), figsize=(5.5 * len(tests), 5), sharey=True, squeeze=False)
    colors = pyplot.get_cmap("tab20").colors
    for axes, test in zip(panels[0], tests, strict=True):
        for i, (name, rows) in enumerate(_by_method(whole).items()):
            style = {"label": name, "color": colors[i % len(colors)], "linestyle": "-" if i < len(colors) else ":"}
            points = [(s, values) for s in shots if (values := _scores(rows, test, s))]
            means = [100 * statistics.mean(values) for _, values in points]
            if rows[0]["once"]:
                axes.axhline(means[0], **{**style, "linestyle": "--"})
                continue
            spread = [100 * _deviation(values) for _, values in points]
            axes.errorbar([s for s, _ in points], means, spread, marker="o", markersize=3, capsize=2, **style)
        axes.set(xscale="log", xlabel="shots per class", title=test)
        axes.set_xticks(shots, [str(s) for s in shots])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("top-1 accuracy, %")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _base_to_new(results: list[dict[str, Any]], test: str) -> str:
    """Accuracy on the classes that were trained on, accuracy on the others, and their harmonic mean, over seeds."""
    halves = [half for half in ("base", "new") if f"{test} {half}" in _tests(results)]
    counted = ", ".join(f"{half}: {_samples(results, f'{test} {half}')}" for half in halves)
    lines = [f"### {test}, from base to new classes ({counted})", ""]
    lines += _table(["method", "shots", "base", "new", "harmonic mean"])
    for name, rows in _by_method(results).items():
        for shots in sorted({r["shots"] for r in rows}):
            base, new = (_scores(rows, f"{test} {half}", shots) for half in ("base", "new"))
            both = [2 * b * n / (b + n) if b + n else 0.0 for b, n in zip(base, new, strict=True)]
            lines.append(_row([name, str(shots), _shown(base), _shown(new), _shown(both)]))
    return "\n".join(lines)


def _tests(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(test for r in results for test in r["tests"]))


def _by_method(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        rows_of.setdefault(r["method"], []).append(r)
    return rows_of


def _scores(rows: list[dict[str, Any]], test: str, shots: int) -> list[float]:
    """Accuracies of all seeds."""
    return [r["tests"][test][METRIC] for r in rows if r["shots"] == shots and test in r["tests"]]


def _deviation(values: list[float]) -> float:
    """Sample standard deviation, 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _shown(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * _deviation(values):.1f}" if len(values) > 1 else mean


def _samples(results: list[dict[str, Any]], test: str) -> str:
    """Number of images of a test set that the accuracies count; results of earlier versions do not state it."""
    scores = next(r["tests"][test] for r in results if test in r["tests"])
    of = f" of {int(scores['of'])}" if "of" in scores else ""
    return f"{int(scores['samples'])}{of} images"


def _majority(results: list[dict[str, Any]], test: str) -> float | None:
    return next((r["baselines"][test]["majority"] for r in results if r["baselines"].get(test)), None)


def _table(columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [_row(columns), "|" + "---|" * len(columns)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
