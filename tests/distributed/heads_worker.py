"""Ranks of test_heads_ranks.py: trains one recipe after the other in one process group.

deepspeed --num_accelerators 2 heads_worker.py RECIPE.yaml ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.engine import trainer  # noqa: E402

if __name__ == "__main__":
    for path in sys.argv[1:]:
        if not path.startswith("--"):
            assert trainer.run(recipes.load(path)) == 0
