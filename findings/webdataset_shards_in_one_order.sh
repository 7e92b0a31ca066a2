#!/usr/bin/env bash
# webdataset: shardshuffle=100 shuffles the shards once; every epoch then has the same order of shards.
#
# A good guess: shards are shuffled anew each epoch, with `seed` from a sequence that is reproducible.
# What happens: the generator is made anew from the same seed at each iteration, also when no seed was given (one is drawn
#   when the data set is built). detshuffle=True counts epochs, but in the data set object: with a DataLoader whose workers
#   are started anew each epoch (the default) it, too, repeats its first epoch for ever.
# Source: webdataset.compat.WebDataset.__init__ (shuffle(..., seed=self.seed)) and webdataset.filters._shuffle (random.Random(seed)).
# Who is hurt: training over many epochs with a small sample buffer: neighbours in a batch are the same every time.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 webdataset==1.0.2 accelerate==1.15.0

observe <<'PY'
import io, tarfile
import torch, webdataset as wds

for index in range(20):
    with tarfile.open(f"{index:02d}.tar", "w") as shard:
        member = tarfile.TarInfo(f"{index:02d}.txt")
        member.size = 1
        shard.addfile(member, io.BytesIO(b"x"))
shards = [f"{index:02d}.tar" for index in range(20)]

def epochs(workers, **options):
    loader = wds.WebDataset(shards, shardshuffle=100, **options)
    if workers:
        loader = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=1)
    return len({tuple(sample["__key__"] for sample in loader) for _ in range(3)})

seen = {}
for options in ({}, {"seed": 7}, {"detshuffle": True, "seed": 7}):
    for workers in (0, 1):
        seen[tuple(options), workers] = count = epochs(workers, **options)
        print(f"WebDataset(shardshuffle=100, {options}), {workers} workers: different orders of 20 shards in 3 epochs: {count}")
assert list(seen.values()) == [1, 1, 1, 1, 3, 1], seen
PY
