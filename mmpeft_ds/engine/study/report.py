"""The table of a study: RUN_DIR/study.md and RUN_DIR/study.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpeft_ds.files import write_atomic, write_json
from mmpeft_ds.recipe.study import FILES


def write(folder: Path, settings: Mapping[str, dict[str, Any]], problems: Mapping[str, str]) -> str:
    """Write the table of all members, finished or failed, and return it.

    Args:
        settings: member -> the settings in which members differ.
        problems: member -> reason why it ended early; empty if it is finished.
    """
    rows = []
    for name, own in settings.items():
        row = {"name": name, "settings": own, "problem": problems[name]}
        if not problems[name]:
            row["metrics"] = json.loads((folder / name / "finished.json").read_text("utf-8"))["metrics"]
        rows.append(row)
    markdown, as_json = (folder / name for name in FILES)
    write_json(as_json, rows)
    text = table(rows)
    write_atomic(markdown, text + "\n")
    return text


def table(rows: list[dict[str, Any]]) -> str:
    """Members, their settings and their results, as Markdown."""
    keys = list(rows[0]["settings"])
    metric = next((row["metrics"]["best_metric"] for row in rows if row.get("metrics", {}).get("best_metric")), None)
    head = ["member", *keys, "trained", "steps", "last loss"]
    head += [f"best {metric}", "at step", "scored"] if metric else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["name"], *(_shown(row["settings"][key]) for key in keys)]
        if row["problem"]:
            cells += [f"ended early: {row['problem'][:80]}".replace("|", "/")]
        else:
            of = row["metrics"]
            cells += [f"{of['trainable_parameters']:,}", str(of["steps"]), _shown(of["train_loss"])]
            cells += [_shown(of["best"]), str(of["best_step"]), _shown(of.get("best_counted"))] if metric else []
        lines.append("| " + " | ".join(cells + [""] * (len(head) - len(cells))) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "\\|")
