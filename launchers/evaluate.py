#!/usr/bin/env python
"""Evaluate a run on a whole split, every sample exactly once, and print the scores beside the baselines.

    deepspeed --num_accelerators 2 launchers/evaluate.py --run runs/quickstart --split test

Writes RUN/evaluation-SPLIT.json and RUN/predictions-SPLIT.jsonl, and with --submission the result file that the data
set's evaluation server takes. With --data the names of the data sets follow SPLIT, as in evaluation-test-gqa.json. A
split without answers is predicted and not scored. Any number of ranks gives the same, the loss up to rounding.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.runs import inputs, submission  # noqa: E402


def main() -> int:
    """Evaluate and print one table a data set."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--split", help="split of the run's data sets (default: test, or val where there is no test)")
    parser.add_argument("--data", nargs="+", default=[], metavar="DIR", help="only these data sets of the run")
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a name below RUN/checkpoints")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--submission", choices=submission.FORMS, help=f"also write a result file: {submission.HELP}")
    args = parser.parse_args()
    recipe = recipes.of_run(args.run, args.set)  # mistakes in it are reported before torch is imported
    split = args.split or inputs.default_split(args.data or [source.dir for source in recipe.data.sources])
    with console.quick_imports():
        from mmpeft_ds.runs.evaluate import evaluate_run, named

    reports = evaluate_run(args.run, split, args.checkpoint, args.set, args.submission or "", args.data)
    if reports is None:
        if console.rank() == 0:
            print(f"{args.run}: evaluation was stopped; nothing was written")
        return 1
    if console.rank() == 0:
        for report in reports:
            left_out = f", {report['bad_samples']:,} bad samples left out" if report["bad_samples"] else ""
            changed = f", {report['changed']}" if report["changed"] else ""
            counted = f"{report['scored']:,} of {report['there']:,} {report['unit']} scored{left_out}{changed}"
            how = f", evaluator {report['vqa_measure']}" if report["vqa_measure"] else ""
            title = f"{report['dir']} ({report['split']}), {counted}{how}, {report['checkpoint']}"
            console.score_table(report["scores"], report["baselines"], title)
        name = named(split, recipe.data.sources, args.data)
        print(f"predictions: {args.run / f'predictions-{name}.jsonl'}")
    return 0


if __name__ == "__main__":
    console.run(main)
