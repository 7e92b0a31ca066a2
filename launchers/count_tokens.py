#!/usr/bin/env python
"""Count the tokens and patches of every sample that a recipe trains on, by which data.pack plans micro-batches.

    python launchers/count_tokens.py --recipe R.yaml
    deepspeed --num_accelerators 8 launchers/count_tokens.py --recipe R.yaml

The counts are stored next to the data, for the recipe's tokenizer, template, image processor, limits and task; a run,
and train.py --check, then read them. What is counted already is not counted again. No image is decoded.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402


def main() -> int:
    """Parse, then count."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file, see recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    args = parser.parse_args()
    recipe = recipes.load(args.recipe, args.set)
    if not recipe.data.pack:
        raise BadInput("data.pack: 0. Tokens are counted for packing; set it to the tokens of a micro-batch.")
    with console.quick_imports():
        from mmpeft_ds.distributed import processes
        from mmpeft_ds.engine import token_counts
        from mmpeft_ds.engine.assembly import resolve

        resolved = resolve.resolve(recipe)
        ranks = processes.start(**recipe.start_options())
    for source in resolved.train:
        line = token_counts.summary(resolved, source, token_counts.token_counts(resolved, source, ranks))
        if ranks.rank == 0:
            print(line)
    return 0


if __name__ == "__main__":
    console.run(main)
