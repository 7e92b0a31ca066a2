#!/usr/bin/env python
"""What a recipe will cost: data, trainables by kind, steps, memory per rank. The same as train.py --check.

python launchers/plan.py --recipe recipes/quickstart.yaml [--set A.B=VALUE ...] [--json]
"""

import json
import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402


def main() -> int:
    """Print the plan of a recipe."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file, see recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    recipe = recipes.load(args.recipe, args.set)
    from mmpeft_ds.engine.assembly.outline import outline

    outline(recipe)  # what is wrong with recipe or data is said before torch is imported
    from mmpeft_ds.engine import plan
    from mmpeft_ds.engine.assembly import resolve

    report = plan.make(resolve.resolve(recipe))
    if console.rank() == 0:
        print(json.dumps(report, indent=1)) if args.json else plan.show(report)
    return 0


if __name__ == "__main__":
    console.run(main)
