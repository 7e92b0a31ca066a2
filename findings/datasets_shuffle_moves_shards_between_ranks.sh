#!/usr/bin/env bash
# datasets: a shuffle after split_dataset_by_node changes which shards a rank reads; with a seed per rank, samples are lost.
#
# A good guess: the split gives each rank its part, and what is shuffled afterwards is that part, so that every rank may have a seed
#   of its own, or none.
# What happens: the shards of the whole data set are shuffled first and dealt out then, in whatever order the two calls stand. Ranks
#   whose seeds differ deal from different orders: some shards are read by several ranks, others by none, in every epoch
#   anew. shuffle() without a seed draws one in each process. One seed for all ranks reads every sample once.
# Source: datasets.IterableDataset._prepare_ex_iterable_for_iteration (shuffle_data_sources before shard_data_sources), shuffle (seed=None).
# Who is hurt: training on several ranks from shards, with seed + rank, or without a seed: with 4 ranks a fourth to a third of an epoch is never read.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 datasets==5.2.0

observe <<'PY'
import datasets
from datasets.distributed import split_dataset_by_node

RANKS, SHARDS = 4, 16
data = datasets.Dataset.from_dict({"i": list(range(2 * SHARDS))})


def share(split_first, seed_of_rank):
    """Share of the samples that any of the ranks reads in one epoch; each rank reads as many as it should."""
    seen = []
    for rank in range(RANKS):
        stream = data.to_iterable_dataset(num_shards=SHARDS)
        if split_first:
            stream = split_dataset_by_node(stream, rank, RANKS).shuffle(seed=seed_of_rank(rank), buffer_size=4)
        else:
            stream = split_dataset_by_node(stream.shuffle(seed=seed_of_rank(rank), buffer_size=4), rank, RANKS)
        mine = [sample["i"] for sample in stream]
        assert len(mine) == len(data) // RANKS
        seen += mine
    return len(set(seen)) / len(data)


for name, seed_of_rank, all_read in (("one seed for all ranks", lambda rank: 7, True), ("seed + rank", lambda rank: 7 + rank, False),
                                     ("no seed", lambda rank: None, False)):
    shares = [share(split_first, seed_of_rank) for split_first in (True, False)]
    print(f"{RANKS} ranks, {SHARDS} shards, {name}: share of samples that is read, split then shuffled {shares[0]:.2f}, "
          f"shuffled then split {shares[1]:.2f}")
    assert shares == [1.0, 1.0] if all_read else max(shares) < 0.85
PY
