"""Ranks of test_ga_net_run.py: trains a recipe, then reports on its graph, in one process group.

deepspeed --num_accelerators 2 ga_net_run_worker.py RECIPE.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.engine import trainer  # noqa: E402
from mmpeft_ds.runs import graph_report  # noqa: E402

if __name__ == "__main__":
    recipe = recipes.load(next(a for a in sys.argv[1:] if not a.startswith("--")))
    assert trainer.run(recipe) == 0
    graph_report.of_run(Path(recipe.run_dir), "train")
