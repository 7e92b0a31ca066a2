#!/usr/bin/env bash
# accelerate with webdataset: prepare() on a loader over split_by_node deals the data out twice; half of it is never read.
#
# A good guess: WebDataset(nodesplitter=split_by_node) gives each rank its own shards, as webdataset's guides say, and
#   prepare() moves batches to the device.
# What happens: prepare() takes any iterable data set for one that every rank reads whole. It deals batches out over the
#   ranks (by default rank 0 alone reads, and passes its batches on): with 2 ranks half of the samples are never seen, with
#   8 ranks seven eighths, with dispatch_batches either way.
# Source: accelerate.data_loader.prepare_data_loader (DataLoaderDispatcher, IterableDatasetShard).
# Who is hurt: Trainer and accelerate users with WebDataset shards: epochs look short, most data is unused, no warning.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 webdataset==1.0.2 accelerate==1.15.0

in_ranks 2 <<'PY'
import io, tarfile
import torch, webdataset as wds
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object

accelerator = Accelerator(cpu=True)
if accelerator.is_main_process:
    for index in range(4):
        with tarfile.open(f"{index}.tar", "w") as shard:
            for sample in range(8):
                text = str(index * 8 + sample).encode()
                member = tarfile.TarInfo(f"{index}{sample}.txt")
                member.size = len(text)
                shard.addfile(member, io.BytesIO(text))
accelerator.wait_for_everyone()
shards = [f"{index}.tar" for index in range(4)]
seen = {}
for splitter, split in (("split_by_node", wds.split_by_node), ("none", lambda shards: shards)):
    for dispatch in (None, False):
        here = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
        data = wds.WebDataset(shards, shardshuffle=False, nodesplitter=split).map(lambda s: torch.tensor(int(s["txt"])))
        mine = [int(x) for batch in here.prepare(torch.utils.data.DataLoader(data, batch_size=2)) for x in batch]
        seen[splitter, dispatch] = len(set(gather_object(mine)))
        if accelerator.is_main_process:
            print(f"2 ranks, nodesplitter {splitter}, dispatch_batches {dispatch}: samples read by any rank: "
                  f"{seen[splitter, dispatch]} of 32")
assert list(seen.values()) == [16, 16, 32, 32], seen
torch.distributed.destroy_process_group()
PY
