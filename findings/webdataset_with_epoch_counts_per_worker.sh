#!/usr/bin/env bash
# webdataset: with_epoch(n) on the data set gives n samples for each loader worker.
#
# A good guess: an epoch has n samples, whatever num_workers is.
# What happens: every worker runs its own copy of the data set, and each gives n: 24 samples for with_epoch(12) with 2
#   workers. On a WebLoader, with_epoch counts what the loader gives.
# Source: webdataset.pipeline.DataPipeline.with_epoch and iterator, in each worker process.
# Who is hurt: schedules computed from n: twice the steps with twice the workers, decay that ends too early.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 webdataset==1.0.2 accelerate==1.15.0

observe <<'PY'
import io, tarfile
import torch, webdataset as wds

for index in range(4):
    with tarfile.open(f"{index}.tar", "w") as shard:
        for sample in range(20):
            member = tarfile.TarInfo(f"{index}{sample:02d}.txt")
            member.size = 1
            shard.addfile(member, io.BytesIO(b"x"))
shards = [f"{index}.tar" for index in range(4)]
seen = {}
for workers in (0, 1, 2, 4):
    data = wds.WebDataset(shards, shardshuffle=False)
    loader = torch.utils.data.DataLoader(data.with_epoch(12), batch_size=None, num_workers=workers)
    of_loader = wds.WebLoader(wds.WebDataset(shards, shardshuffle=False), batch_size=None, num_workers=workers).with_epoch(12)
    seen[workers] = (sum(1 for _ in loader), sum(1 for _ in of_loader))
    print(f"{workers} workers: samples of data.with_epoch(12): {seen[workers][0]}, of loader.with_epoch(12): {seen[workers][1]}")
assert seen == {0: (12, 12), 1: (12, 12), 2: (24, 12), 4: (48, 12)}, seen
PY
