"""Ranks that train recipes one after the other and say where they are, and over how many a copy of the base is split.

deepspeed --module tests.helpers.rank_scripts.train_on_nodes RECIPE.yaml=RUN_DIR ...
"""

import os
import socket
import sys

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import trainer

if __name__ == "__main__":
    for word in sys.argv[1:]:
        if not word.startswith("--"):
            path, _, run = word.partition("=")
            assert trainer.run(recipes.load(path, [f"run_dir={run}"])) == 0
            from deepspeed.utils import groups

            copies = groups._get_zero_param_intra_parallel_group()
            split = copies.size() if copies is not None else 1
            rank, world, local, size = (
                os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            )
            print(
                f"rank {rank} of {world} on {socket.gethostname()}: rank {local} of {size} there, copies of the base "
                f"split over {split}",
                flush=True,
            )
