"""Ranks that train recipes one after the other in one process group, and say on each rank how each ended.

deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.train_or_refuse RECIPE.yaml ...

`{rank}` in a path is the number of the rank.
"""

import os
import sys

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import trainer
from mmpeft_ds.errors import BadInput


def main() -> None:
    for path in sys.argv[1:]:
        if path.startswith("--"):
            continue
        recipe = recipes.load(path.format(rank=os.environ["RANK"]))
        try:
            ended = f"code {trainer.run(recipe)}"
        except BadInput as problem:
            ended = f"refused: {problem}"
        print(f"rank {os.environ['RANK']} {recipe.run_dir}: {ended}", flush=True)


if __name__ == "__main__":
    main()
