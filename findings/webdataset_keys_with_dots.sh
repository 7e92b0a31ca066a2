#!/usr/bin/env bash
# webdataset: files whose names hold a dot before the ending become one sample, and pictures are lost without a word.
#
# A good guess: the sample's key is the file name without its last ending, as everywhere: img_1.25x.jpg and img_1.50x.jpg
#   are two samples.
# What happens: the key ends at the first dot of the file name, the rest is the field: one sample img_1 with the fields
#   "25x.jpg" and "50x.jpg", and no field "jpg" at all. Dots in folder names do no harm.
# Source: webdataset.tariterators.base_plus_ext.
# Who is hurt: shards made of files named after versions, sizes, decimals, video times or web addresses.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 webdataset==1.0.2 accelerate==1.15.0

observe <<'PY'
import io, tarfile
import webdataset as wds

with tarfile.open("shard.tar", "w") as shard:
    for name in ("v1.0/a.jpg", "img_1.25x.jpg", "img_1.25x.cls", "img_1.50x.jpg", "img_1.50x.cls"):
        member = tarfile.TarInfo(name)
        member.size = 1
        shard.addfile(member, io.BytesIO(b"1"))
samples = [{k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")}
           for sample in wds.WebDataset("shard.tar", shardshuffle=False)]
for sample in samples:
    print(sample["__key__"], sorted(k for k in sample if k != "__key__"))
assert [sample["__key__"] for sample in samples] == ["v1.0/a", "img_1"] and "jpg" not in samples[1]
PY
