"""The end of a run in words: what it reached, beside what needs no model, and what it took."""

from __future__ import annotations

from typing import Any

from mmpeft_ds import console
from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.engine.streams import records

BASELINES_UP_TO = 20_000  # samples whose records are read for the baselines; more wait for launchers/evaluate.py


def table(metrics: dict[str, Any], scores: dict[str, float], baselines: dict[str, float]) -> str:
    """The final table of a run.

    Args:
        metrics: of `Training.finish`.
        scores: of the best checkpoint on the first validation source; empty without validation.
        baselines: of the same task and data.
    """
    facts = shown(metrics)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    if scores:
        title = _joined(metrics.get("best_of") or "validation", _step(metrics), metrics.get("best_counted"))
        lines.append(console.score_text(scores, baselines, title))
    return "\n".join(lines)


def shown(metrics: dict[str, Any]) -> dict[str, str]:
    """Metrics of a run as people read them: what is empty left out, numbers rounded, the best score by its name."""
    facts = {}
    for name, value in metrics.items():
        if name in ("best_of", "best_metric", "best_step", "best_counted") or value in (None, "", [], {}):
            continue
        if name == "best":  # a best score of 0 is said as well
            place = _joined(_step(metrics), metrics.get("best_of"))
            text = f"{_number(value)} ({place})" if place else _number(value)
            facts[f"best {metrics.get('best_metric') or 'score'}"] = text
        elif value != 0:
            facts[name] = _number(value)
    return facts


def baselines_of(resolved: Resolved) -> dict[str, float]:
    """Scores without a model on the first validation source; none where reading the records would take long."""
    if not resolved.validation:
        return {}
    source = resolved.validation[0]
    train = [s for s in resolved.train if s.options.task["name"] == source.options.task["name"]][:1]
    if not train or train[0].samples + source.samples > BASELINES_UP_TO:
        return {}
    return source.task.baselines(records(train[0], True), records(source, True))


def _step(metrics: dict[str, Any]) -> str:
    """Of the best score; empty for a head that is solved, without a step."""
    return f"step {metrics['best_step']}" if metrics.get("best_step") else ""


def _joined(*parts: str | None) -> str:
    return ", ".join(filter(None, parts))


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | list | dict):
        return str(value)
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_number(count)}" for key, count in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
