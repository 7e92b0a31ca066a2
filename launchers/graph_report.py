#!/usr/bin/env python
"""Measure how the accuracy of a graph over the batch depends on the batch: no edges, shuffled, sorted by class.

    deepspeed --num_accelerators 2 launchers/graph_report.py --run runs/ga_net_pets --split test

What `sorted by class` gains over the shuffled orders is leakage, not skill. Writes RUN/graph-report-SPLIT.json.
"""

import json
import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402


def main() -> int:
    """Evaluate in every order and print one table."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--split", default="test", help="split of the run's first data set (default: test)")
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a name below RUN/checkpoints")
    parser.add_argument("--batch", type=int, default=0, help="samples of a graph (default: data.global_batch)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    args = parser.parse_args()
    recipes.of_run(args.run, args.set)  # mistakes in it are reported before torch is imported
    with console.quick_imports():
        from mmpeft_ds.runs.graph_report import of_run

    lines = of_run(args.run, args.split, args.checkpoint, args.batch, args.set)
    if lines is None:
        if console.rank() == 0:
            print(f"{args.run}: was stopped; nothing was written")
        return 1
    if console.rank() == 0:
        report = json.loads((args.run / f"graph-report-{args.split}.json").read_text())
        show(lines, f"{args.run} on {args.split}, {report['rows']:,} of {report['there']:,} samples")
    return 0


def show(lines: list, title: str) -> None:
    """One row an order."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=console.one_line(title), title_justify="left")
    columns = {
        "order": "",
        "top1": "top-1",
        "degree": "edges per node",
        "same_class": "same class",
        "isolated": "isolated",
    }
    for name in columns.values():
        table.add_column(name, justify="left" if not name else "right")
    for line in lines:
        cells = (line.get(key) for key in columns)
        table.add_row(*("-" if c is None else c if isinstance(c, str) else f"{c:.4f}" for c in cells))
    Console().print(table)


if __name__ == "__main__":
    console.run(main)
