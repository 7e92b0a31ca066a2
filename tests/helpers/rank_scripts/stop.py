"""Ranks of test_stop_ranks.py: a loop of collectives that stops when any rank has noticed a reason to.

deepspeed --module tests.helpers.rank_scripts.stop FOLDER
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mmpeft_ds.stop import StopFlag, watching


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)
    folder = parser.parse_args().folder
    rank = os.environ["RANK"]
    dist.init_process_group("gloo")
    with StopFlag(20.0) as flag:
        flag.begin()
        steps = 0
        print(f"rank {rank} ready", flush=True)
        while True:
            time.sleep(0.02)
            steps += 1
            asked = torch.tensor(float(flag.requested()))
            dist.all_reduce(asked)
            if asked > 0:
                break
    (folder / f"rank{rank}").write_text(f"{steps} {flag.reason}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with watching():
        sys.exit(main())
