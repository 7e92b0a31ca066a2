#!/usr/bin/env python
"""Train a recipe, or continue its run directory.

deepspeed --num_accelerators 2 launchers/train.py --recipe recipes/quickstart.yaml --set optim.lr=1e-3
torchrun --nproc-per-node 2 launchers/train.py --recipe recipes/quickstart.yaml
python launchers/train.py --recipe recipes/quickstart.yaml --check [--samples N] [--ranks N ...] [--json FILE]
"""

import json
import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402


def main() -> int:
    """Parse, then check, print or train."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file, see recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe with every default filled in")
    parser.add_argument("--fresh", action="store_true", help="start over in a new directory; never overwrites")
    parser.add_argument("--check", action="store_true", help="say what a start would refuse or do, and print sizes")
    sizes = parser.add_argument_group("with --check")
    sizes.add_argument("--json", metavar="FILE", help="write the numbers as JSON; - prints them instead of the tables")
    sizes.add_argument("--samples", type=int, metavar="N",
                       help="before the data is there: take N samples for each split, marked as assumed")  # fmt: skip
    sizes.add_argument("--labels", type=int, metavar="N", help="of such data: answers or classes (default: 1,000)")
    sizes.add_argument("--ranks", type=int, nargs="+", metavar="N", help="work out the memory for N ranks as well")
    args = parser.parse_args()
    for name in ("json", "samples", "labels", "ranks"):
        if getattr(args, name) is not None and not args.check:
            parser.error(f"--{name} is about what --check prints. Add --check")
    if min(args.ranks or [1]) < 1:
        raise BadInput("--ranks: must be 1 or more.")
    recipe = recipes.load(args.recipe, args.set)
    if args.print_recipe and console.rank() == 0:
        print(recipes.to_yaml(recipes.filled(recipe)), end="")
    if args.print_recipe and not args.check:
        return 0
    from mmpeft_ds.data.assumed import Assumed
    from mmpeft_ds.engine.assembly.outline import outline

    assumed = None if args.samples is None else Assumed(args.samples, args.labels or Assumed.labels)
    outline(recipe, assumed)  # mistakes in recipe or data are reported before torch is imported
    from mmpeft_ds.engine.run_lock import first_free, refuse_taken, refuse_unwritable

    target = first_free(Path(recipe.run_dir)) if args.fresh else Path(recipe.run_dir)
    if args.check:
        recipe.run_dir = str(target)
        refuse_taken(target)
        with console.quick_imports():
            from mmpeft_ds.engine import plan
            from mmpeft_ds.engine.assembly import resolve

            # Inside as well, since transformers imports the classes of a model when it is built.
            report = plan.make(resolve.resolve(recipe, assumed), args.ranks or ())
        if console.rank() == 0:
            show(report, args.json)
        return 0
    if console.one_machine():  # of several only that of rank 0 may see run_dir
        refuse_unwritable(target)
    with console.quick_imports(compiles=recipe.engine.compile):
        from mmpeft_ds.engine import trainer
    return trainer.run(recipe, fresh=args.fresh)


def show(report: dict, file: str | None) -> None:
    """Print the numbers of --check as tables, or as JSON to a file or (-) in place of the tables."""
    from mmpeft_ds.engine import plan
    from mmpeft_ds.files import write_json

    if file == "-":
        print(json.dumps(report, indent=1))
        return
    plan.show(report)
    if file:
        write_json(Path(file), report)


if __name__ == "__main__":
    console.run(main)
