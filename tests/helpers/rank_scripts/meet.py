"""Ranks of test_own_store.py: meet, count each other, and stay a moment.

python -m tests.helpers.rank_scripts.meet      (one process per rank)
"""

import sys
import time

import torch

from mmpeft_ds.distributed import processes
from mmpeft_ds.errors import BadInput


def main() -> None:
    try:
        ranks = processes.start(threads=1)
    except BadInput as problem:
        print(problem, flush=True)
        sys.exit(2)
    met = torch.ones(1)
    torch.distributed.all_reduce(met)
    assert met.item() == ranks.world_size
    time.sleep(5)  # in which the other launch comes to the port
    if ranks.rank == 0:
        print(f"all {ranks.world_size} ranks have met", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
