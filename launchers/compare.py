#!/usr/bin/env python
"""A comparison of methods at equal trainable budgets: scores, forgetting, memory, time and bytes of each.

    make compare            or: python launchers/compare.py --steps 240 --seeds 3 --out runs/compare
    python launchers/compare.py --recipe my.yaml --methods lora adapter routed_lora:route=mul peft:type=loha

Without --recipe: easy-VQA with packaged towers, which is prepared first. Every run goes through launchers/train.py;
the same command continues where it was stopped. Writes a result file per run in the form of the method comparison of
Hugging Face peft, table.md and pareto.png; docs/comparison.md says what the columns mean.
"""

import functools
import os
import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launchers._run import ROOT, launch, python  # noqa: E402
from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402

RECIPE, DATA = "recipes/quickstart.yaml", "data/easy-vqa"
FASTEST = "engine.deepspeed=ds_configs/zero1.json"  # of one machine; its losses are those of ZeRO-3
SECOND = "data/openclipart"


def main() -> int:
    """Parse, prepare the data where no recipe is given, run what is missing, report."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", help=f"the recipe whose method is replaced (default: {RECIPE})")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME[:OPTION=VALUE,...]",
                        help="rows (default: every method that fits; routed_lora once for each route)")  # fmt: skip
    parser.add_argument("--budget", type=int, default=0, metavar="N",
                        help="parameters a method trains, its head aside (default: as the recipe's own)")  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=0.1, help="share by which it may differ (default: 0.1)")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run (default: 120)")
    parser.add_argument("--evaluations", type=int, default=4, help="on validation data in a run (default: 4)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row (default: 1)")
    parser.add_argument("--split", default="", help="also score on this split, such as test (default: validation)")
    parser.add_argument("--second", help=f"data of the second task; none: no forgetting (default: {SECOND}, if there)")
    parser.add_argument("--second-split", default="test", help="split of that data (default: test)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    args = parser.parse_args()
    for name in ("seeds", "ranks"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name}: must be 1 or more, got {getattr(args, name)}.")
    recipe, out = args.recipe and os.path.abspath(args.recipe), Path(os.path.abspath(args.out))
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    os.chdir(ROOT)  # where the launchers run
    recipe = recipes.load(recipe or RECIPE, args.set if args.recipe else [FASTEST, *args.set])
    if not args.recipe and (code := prepare()):
        return code
    with console.quick_imports():
        from mmpeft_ds.runs.comparison import report
        from mmpeft_ds.runs.comparison.study import Comparison, Settings

    settings = Settings(args.steps, args.evaluations, args.budget, args.tolerance, args.split, second_of(args.second),
                        args.second_split)  # fmt: skip
    comparison = Comparison.open(out, recipe, settings, args.methods)
    code, done = comparison.run(args.seeds, functools.partial(launch, ranks=args.ranks))
    print(f"\n{report.write(out, comparison.refused)}\nwritten: {out}/table.md, pareto.png, results/")
    if not done:
        print("not all rows are done; the same command continues from here", file=sys.stderr)
    return code


def prepare() -> int:
    """Data of the quickstart and its feature statistics; quick where they are there."""
    code = python("data_prep/prepare.py", "easy-vqa", "--out", DATA)
    return code or python("data_prep/feature_stats.py", DATA, "--recipe", RECIPE)


def second_of(given: str | None) -> str:
    """Directory of the second task's data; empty if there is to be none."""
    if given is None and not Path(SECOND, "manifest.json").is_file():
        print(f"note: {SECOND} is not prepared (make openclipart-data), so no forgetting is measured")
    return "" if given == "none" else given or (SECOND if Path(SECOND, "manifest.json").is_file() else "")


if __name__ == "__main__":
    console.run(main)
