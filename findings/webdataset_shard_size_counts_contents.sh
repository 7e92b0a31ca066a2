#!/usr/bin/env bash
# webdataset: ShardWriter(maxsize=...) bounds the contents, not the file: shards of small samples are 100 times as large.
#
# A good guess: maxsize is "Maximum size of each shard", so that a file of the data set is at most a little larger.
# What happens: only the bytes of the values are added up. A tar archive has a block of 512 bytes before every value and fills the
#   value up to 512; moreover the writer stamps each file with a time that has a fraction, which takes two more blocks (a PAX header)
#   a value. A caption of 22 bytes and a label of one thus take 4,096 bytes and count as 23. An mtime without a fraction halves the files.
# Source: webdataset.writer.TarWriter.write (total += ti.size; ti.mtime = time.time()) and ShardWriter.write.
# Who is hurt: shards of captions, labels and small feature vectors: caches and disks that were measured by maxsize, and the number of
#   shards, which is to be at least that of the workers.
. "$(dirname "$0")/_lib.sh"
pins webdataset==1.0.2

observe <<'PY'
import os, tarfile
import webdataset

SAMPLES, MAXSIZE = 10_000, 100_000
SAMPLE = {"txt": b"a caption of few words", "cls": b"1"}


def sizes(folder, **options):
    os.mkdir(folder)
    with webdataset.ShardWriter(f"{folder}/%03d.tar", maxsize=MAXSIZE, verbose=0, **options) as writer:
        for index in range(SAMPLES):
            writer.write({"__key__": f"{index:06d}", **SAMPLE})
    return [os.path.getsize(f"{folder}/{name}") for name in sorted(os.listdir(folder))]


as_it_is, whole_seconds = sizes("as_it_is"), sizes("whole_seconds", mtime=0)
for name, written in (("as it is", as_it_is), ("mtime=0", whole_seconds)):
    print(f"{name}: {len(written)} shards, the largest has {max(written):,} bytes, {max(written) / MAXSIZE:.0f} times maxsize={MAXSIZE:,}")
with tarfile.open("as_it_is/000.tar") as archive:
    print("PAX header of the first file:", sorted(archive.next().pax_headers))
assert len(as_it_is) == len(whole_seconds) == 3
assert 160 < max(as_it_is) / MAXSIZE < 190 and 1.9 < max(as_it_is) / max(whole_seconds) < 2.1
PY
