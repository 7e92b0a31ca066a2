#!/usr/bin/env python
"""Evaluate a run on a whole split, every sample exactly once, and print the scores beside the baselines.

    deepspeed --num_accelerators 2 launchers/evaluate.py --run runs/quickstart --split test

Writes RUN/evaluation-SPLIT.json and RUN/predictions-SPLIT.jsonl. Any number of ranks gives the same scores.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402


def main() -> int:
    """Evaluate and print one table a data set."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--split", default="test", help="split of the run's data sets (default: test)")
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a name below RUN/checkpoints")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    args = parser.parse_args()
    from mmpeft_ds.engine.assess import assess

    reports = assess(args.run, args.split, args.checkpoint, args.set)
    if console.rank() == 0:
        for report in reports:
            show(report)
        print(f"predictions: {args.run / f'predictions-{args.split}.jsonl'}")
    return 0


def show(report: dict) -> None:
    """One table: a line per metric, the run beside the scores that need no model."""
    from rich.console import Console
    from rich.table import Table

    title = f"{report['dir']} ({report['split']}), {report['rows']:,} predictions, {report['checkpoint']}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    scores, baselines = report["scores"], report["baselines"]
    metrics = list(scores)
    for name in metrics:
        table.add_column(name, justify="right")
    main = metrics[0]
    for name in [n for n in baselines if not any(n.startswith(f"{b}_") for b in baselines)]:
        # `majority` stands beside `accuracy`, `majority_yes_no` beside `accuracy_yes_no`
        row = [baselines.get(name + m.removeprefix(main)) if m.startswith(main) else None for m in metrics]
        table.add_row(name.replace("_", " "), *("-" if v is None else f"{v:.4f}" for v in row))
    table.add_row("this run", *(f"{scores[m]:.4f}" for m in metrics), style="bold")
    Console().print(table)


if __name__ == "__main__":
    console.run(main)
