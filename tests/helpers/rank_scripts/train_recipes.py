"""Ranks that train one recipe after the other in one process group.

deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.train_recipes RECIPE.yaml ...
"""

import sys

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import trainer

if __name__ == "__main__":
    for path in sys.argv[1:]:
        if not path.startswith("--"):
            assert trainer.run(recipes.load(path)) == 0
