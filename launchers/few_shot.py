#!/usr/bin/env python
"""A few-shot study: all methods x shots x seeds of a recipe in one process group, then a table, a CSV and a plot.

    deepspeed --num_accelerators 2 launchers/few_shot.py --recipe recipes/few_shot_emoji.yaml
    python launchers/few_shot.py --recipe recipes/few_shot_emoji.yaml --methods TaskRes --shots 16 --seeds 1

The same command continues where it was stopped: a run that has its result is left alone. Results are in the recipe's
run_dir: results.md, results.csv, results.png, and a directory a run.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.runs import few_shot_report  # noqa: E402
from mmpeft_ds.runs.few_shot_study import Study, check_prepared, results  # noqa: E402


def main() -> int:
    """Parse, run what is missing, report."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file with the sections few_shot and methods")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="rows of the recipe (default: all)")
    parser.add_argument("--shots", type=int, nargs="+", default=[], help="of the recipe's (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="of the recipe's (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--check", action="store_true", help="list the runs, what is done, and what data is missing")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables of what is done")
    args = parser.parse_args()
    whole = Study.load(args.recipe, args.set)
    study = whole.only(args.methods, args.shots, args.seeds)
    cells = whole.cells()
    if args.check:
        return check(study) if console.rank() == 0 else 0
    finished = args.report or run(study)
    if console.rank() == 0:
        done = results(whole)
        if done:
            print(few_shot_report.write(whole.out, done))
            print(f"written: {whole.out}/results.md, results.csv, results.png")
        print(f"{len(done)} of {len(cells)} runs are done" + ("" if finished else "; it was stopped"))
    return 0


def run(study: Study) -> bool:
    """Run what is missing; False if it was stopped."""
    with console.quick_imports():
        from mmpeft_ds.runs import few_shot

    return few_shot.run(study)


def check(study: Study) -> int:
    """One line per run; then the data sets that are missing are refused."""
    done = {(r["method"], r["shots"], r["seed"], r["half"]) for r in results(study)}
    left = []
    for cell in study.cells():
        there = (cell.method, cell.shots, cell.seed, cell.half) in done
        print(f"{'done' if there else '    '}  {cell.path}  {cell.title}")
        left += [] if there else [cell]
    check_prepared(left)
    return 0


if __name__ == "__main__":
    console.run(main)
