"""Ranks of test_peft_types_ranks.py: types and starts of peft trained, saved, exported and continued, in one launch.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.peft_types CASES.json OUT

Each case is one of lora_starts.py. Rank 0 writes OUT/NAME.pt with what came out, or with the error.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mmpeft_ds.distributed import processes
from tests.helpers.rank_scripts.lora_starts import run_case


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cases, out = json.loads(Path(args[0]).read_text()), Path(args[1])
    ranks = processes.start(threads=1)
    for case in cases:
        try:
            result = run_case({"looking": False, **case}, out, ranks)
        except Exception as error:  # noqa: BLE001 - some are there to be refused, on all ranks alike
            result = {"error": f"{type(error).__name__}: {error}"}
        if ranks.rank == 0:
            torch.save(result, out / f"{case['name']}.pt")
            print("case done", case["name"], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
