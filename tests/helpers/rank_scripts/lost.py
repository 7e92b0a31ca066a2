"""Rank 1 ends as if it had been killed, while the others wait outside of gloo, which would tell them: as on GPUs."""

from __future__ import annotations

import os
import signal

from torch import distributed as dist

from mmpeft_ds import console
from mmpeft_ds.distributed import processes, watchdog


def main() -> None:
    if os.environ["RANK"] == "1":
        watchdog.Watchdog._watch = lambda self: None  # it dies before that thread gets its first turn
    ranks = processes.start(stall=6, timeout=3000)
    dist.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.distributed_c10d._get_default_store().wait(["never set"])


if __name__ == "__main__":
    console.run(main)
