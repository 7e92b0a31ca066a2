#!/usr/bin/env bash
# torch.distributed.checkpoint: of what every rank has under one name, one rank's is kept, and not the same rank's for every name.
#
# A good guess: each rank saves its own state, as its own RNG state, position in the data, count of samples, and gets it back
#   on load; or a save of different values under one name is refused.
# What happens: anything but a DTensor or ShardedTensor is taken to be equal on all ranks, and written by whichever rank has the
#   least to write so far. Every rank then resumes with, say, the position of rank 0 and the RNG state of rank 1. Nothing is
#   said about it at save or load.
# Source: torch.distributed.checkpoint._dedup_save_plans.dedup_save_plans, by DefaultSavePlanner.create_global_plan.
# Who is hurt: resumed runs: ranks draw the same augmentations and dropout, and read the data of one rank. Names with the rank in
#   them, as f"rng_{rank}", are kept apart.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 numpy==2.4.6

in_ranks 2 <<'PY'
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
state = {"position": 1000 + rank, "rng": torch.get_rng_state(), "counts": torch.full((4,), float(rank)),
         f"counts_{rank}": torch.full((4,), float(rank))}
dcp.save(state, checkpoint_id="saved")
loaded = {"position": -1, "rng": torch.zeros_like(state["rng"]), "counts": torch.full((4,), -1.0),
          f"counts_{rank}": torch.full((4,), -1.0)}
dcp.load(loaded, checkpoint_id="saved")
owner = next(seed for seed in (0, 1) if torch.equal(loaded["rng"], torch.Generator().manual_seed(seed).get_state()))
mine = (loaded["position"], owner, int(loaded["counts"][0]), int(loaded[f"counts_{rank}"][0]))
gathered = [None, None]
dist.all_gather_object(gathered, mine)
if rank == 0:
    for i, (position, owner, count, own) in enumerate(gathered):
        print(f"rank {i} saved position {1000 + i}, its RNG state, counts of {i}; it gets back position {position}, the RNG state of "
              f"rank {owner}, counts of rank {count}, and under a name of its own counts of rank {own}")
shared = {part[:3] for part in gathered}
assert len(shared) == 1 and gathered[0][0] == 1000 and 1 in gathered[0][1:3]
assert [part[3] for part in gathered] == [0, 1]
dist.destroy_process_group()
PY
