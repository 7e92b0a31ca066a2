#!/usr/bin/env python
"""Train a recipe, or continue its run directory.

deepspeed --num_accelerators 2 launchers/train.py --recipe recipes/quickstart.yaml --set optim.lr=1e-3
torchrun --nproc-per-node 2 launchers/train.py --recipe recipes/quickstart.yaml
python launchers/train.py --recipe recipes/quickstart.yaml --check [--json FILE]
"""

import json
import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402


def main() -> int:
    """Parse, then check, print or train."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file, see recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--check", action="store_true", help="resolve everything and print sizes and memory")
    parser.add_argument(
        "--json", metavar="FILE", help="with --check: write its numbers as JSON; - prints them instead"
    )
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe with every default filled in")
    parser.add_argument("--fresh", action="store_true", help="start over in a new directory; never overwrites")
    args = parser.parse_args()
    if args.json and not args.check:
        parser.error("--json writes what --check finds. Add --check")
    recipe = recipes.load(args.recipe, args.set)
    if args.print_recipe and console.rank() == 0:
        print(recipes.to_yaml(recipes.filled(recipe)), end="")
    if args.print_recipe and not args.check:
        return 0
    from mmpeft_ds.engine.assembly.outline import outline

    outline(recipe)  # what is wrong with recipe or data is said before torch is imported
    if args.check:
        from mmpeft_ds.engine import plan
        from mmpeft_ds.engine.assembly import resolve

        report = plan.make(resolve.resolve(recipe))
        if console.rank() == 0:
            show(report, args.json)
        return 0
    from mmpeft_ds.engine import trainer

    return trainer.run(recipe, fresh=args.fresh)


def show(report: dict, file: str | None) -> None:
    """Print the numbers of --check as tables, or as JSON to a file or (-) in the place of the tables."""
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
