#!/usr/bin/env python
"""Train many adapters over one frozen base, side by side in one process group.

deepspeed --num_accelerators 2 launchers/study.py --recipe R.yaml --set run_dir=runs/sweep --vary optim.lr=1e-3,3e-4
deepspeed --num_accelerators 2 launchers/study.py --recipe R.yaml      (a recipe with a section `study`)
python launchers/study.py --recipe R.yaml --vary method.r=4,8 --vary seed=0,1 --check

Each member is the run that launchers/train.py makes of RUN_DIR/NAME/recipe.yaml, in the directory RUN_DIR/NAME. The
same command continues where it was stopped, also with another number of ranks.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.recipe.study import Study  # noqa: E402


def main() -> int:
    """Parse, then check or train."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file; its section `study` or --vary defines the members")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--vary", action="append", default=[], metavar="A.B=VALUE,VALUE",
                        help="values of a key of method, optim or seed; repeatable, for all combinations")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start over in a new directory; never overwrites")
    parser.add_argument("--check", action="store_true", help="check recipe and data, and print sizes")
    args = parser.parse_args()
    study = Study.load(args.recipe, args.set, args.vary)
    from mmpeft_ds.engine.assembly.outline import outline

    for recipe in study.members.values():
        outline(recipe)  # mistakes in recipe or data are reported before torch is imported
    with console.quick_imports():
        if args.check:
            from mmpeft_ds.engine.run_lock import first_free
            from mmpeft_ds.engine.study import plan
        else:
            from mmpeft_ds.engine.study import run
    if not args.check:
        return run.run(study, fresh=args.fresh)
    if args.fresh:
        study.move(first_free(study.run_dir))
    report = plan.make(study)
    if console.rank() == 0:
        plan.show(report)
    return 0


if __name__ == "__main__":
    console.run(main)
