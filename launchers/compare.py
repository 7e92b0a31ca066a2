#!/usr/bin/env python
"""The same budget for every routing function and for plain LoRA, at equal parameters: one plot, one table.

    make compare            or: python launchers/compare.py --steps 240 --out runs/compare

Scores are of the validation split; one seed a row, so read differences of a point or two as noise.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import get_args

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launchers._run import ROOT, counted, launch, python, rows_of  # noqa: E402
from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.files import replacing, write_atomic, write_json  # noqa: E402
from mmpeft_ds.methods.common.options import Route  # noqa: E402

RECIPE, DATA = "recipes/quickstart.yaml", "data/easy-vqa"
SMOOTH = 10  # steps a point of the plot averages


def main() -> int:
    """Train each row unless it is finished, then draw."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each row (default: 120)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    args = parser.parse_args()
    code = python("data_prep/prepare.py", "easy-vqa", "--out", DATA)
    if code := code or python("data_prep/feature_stats.py", DATA, "--recipe", RECIPE):
        return code
    rows = {}
    for number, route in enumerate(routes := get_args(Route), 1):
        print(f"\n--- {number}/{len(routes)} {route}", flush=True)
        if code := train(route, run := args.out / f"{route}-{args.steps}", args):
            return code
        rows[route] = read(run)
    table(rows, args)
    plot(rows, args)
    return 0


def train(route: str, run: Path, args: argparse.Namespace) -> int:
    """One row; ZeRO-1, where a step is fastest on one machine and the losses are those of ZeRO-3."""
    changes = [f"method.route={route}", f"run_dir={run}", f"optim.max_steps={args.steps}"]
    changes += ["engine.deepspeed=ds_configs/zero1.json", "engine.keep_last=1"]
    if code := launch("launchers/train.py", "--recipe", RECIPE, *(a for c in changes for a in ("--set", c))):
        return code
    return launch("launchers/evaluate.py", "--run", str(run), "--split", "val", "--checkpoint", "last")


def read(run: Path) -> dict:
    """What one row shows."""
    (report,), steps = json.loads((ROOT / run / "evaluation-val.json").read_text()), rows_of(run)
    shown = {"counted": counted(report), "scores": report["scores"], "speed": steps[-1]["samples_per_second"]}
    return shown | {"loss": [s["loss"] for s in steps]}


def table(rows: dict, args: argparse.Namespace) -> None:
    """Print it, and write it as Markdown and JSON."""
    metrics = list(next(iter(rows.values()))["scores"])
    lines = ["| route | " + " | ".join(metrics) + " | loss of the last steps |", "|---" * (len(metrics) + 2) + "|"]
    for route, row in rows.items():
        name = "none (plain LoRA)" if route == "none" else route
        values = [f"{row['scores'][m]:.4f}" for m in metrics] + [f"{statistics.mean(row['loss'][-SMOOTH:]):.3f}"]
        lines.append(" | ".join(["| " + name, *values]) + " |")
    text = f"{next(iter(rows.values()))['counted']} of the validation split\n\n" + "\n".join(lines)
    print(f"\n{args.steps} steps each, {time.strftime('%Y-%m-%d')}, {text}")
    write_atomic(ROOT / args.out / "table.md", text + "\n")
    write_json(ROOT / args.out / "table.json", {r: rows[r]["scores"] for r in rows})


def plot(rows: dict, args: argparse.Namespace) -> None:
    """Loss of every row over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for route, row in rows.items():
        loss = [statistics.mean(row["loss"][max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(row["loss"]))]
        axes.plot(range(1, len(loss) + 1), loss, label=f"{route} ({row['scores']['accuracy']:.3f})")
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTH} steps", title="route (validation accuracy)")
    axes.legend()
    with replacing(ROOT / args.out / "plot.png") as partial:
        figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    print(f"plot: {args.out / 'plot.png'}")


if __name__ == "__main__":
    console.run(main)
