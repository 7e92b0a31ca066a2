"""Ranks that train a recipe whose checkpoints are in a cache of the hub, and say who fetches them.

deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.hub RECIPE.yaml [--missing-on RANK] [--nodes]
"""

import os
import sys
from pathlib import Path
from unittest import mock

from huggingface_hub import constants

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import trainer
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.errors import BadInput

RANK = os.environ["RANK"]


def main() -> int:
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if "--nodes" in arguments:  # each rank is a node of its own
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    # By assignment: forked ranks have read HF_HOME before.
    constants.HF_HUB_CACHE = str(Path(arguments[0]).parent / "cache")
    fetch = hub.fetch

    def told(name: str, weights: bool) -> None:
        print(f"rank {RANK} fetches {name}", flush=True)
        if "--missing-on" in arguments and arguments[arguments.index("--missing-on") + 1] == RANK:
            with mock.patch.object(constants, "HF_HUB_CACHE", str(Path(arguments[0]).parent / "empty")):
                return fetch(name, weights)
        fetch(name, weights)

    with mock.patch.object(hub, "fetch", told):
        try:
            ended = f"code {trainer.run(recipes.load(arguments[0]))}"
        except BadInput as problem:
            ended = f"refused: {problem}"
    print(f"rank {RANK}: {ended}", flush=True)
    return 0 if ended == "code 0" else 2


if __name__ == "__main__":
    sys.exit(main())
