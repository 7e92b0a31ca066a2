"""Ranks of test_ga_net_run.py: trains a recipe, then reports on its graph, in one process group.

deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.ga_net_run RECIPE.yaml
"""

import sys
from pathlib import Path

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import trainer
from mmpeft_ds.runs import graph_report

if __name__ == "__main__":
    recipe = recipes.load(next(a for a in sys.argv[1:] if not a.startswith("--")))
    assert trainer.run(recipe) == 0
    graph_report.of_run(Path(recipe.run_dir), "train")
