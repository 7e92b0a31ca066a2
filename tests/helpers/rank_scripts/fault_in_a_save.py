"""Ranks that train a recipe whose first save in the background meets a fault or hangs, in the thread of one rank.

... tests.helpers.rank_scripts.fault_in_a_save RECIPE.yaml RANK fault     that rank has no part for the others
... tests.helpers.rank_scripts.fault_in_a_save RECIPE.yaml RANK hangs     that rank's disk does not answer
"""

import os
import sys
import time
from pathlib import Path

from mmpeft_ds import console
from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import checkpoint_files, trainer
from mmpeft_ds.engine.held import Held


def no_part(*args: object) -> None:
    raise ValueError("no part")


def hang(*args: object) -> None:
    time.sleep(300)


def main() -> int:
    path, rank, kind = (word for word in sys.argv[1:] if not word.startswith("--"))
    if os.environ["RANK"] == rank:
        if kind == "fault":
            Held.of_copies = no_part
        else:
            checkpoint_files.write = hang
    return trainer.run(recipes.load(Path(path)))


if __name__ == "__main__":
    console.run(main)
