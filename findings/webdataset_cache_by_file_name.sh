#!/usr/bin/env bash
# webdataset: cache_dir knows shards by file name alone; a second data set with equal names silently gets the first one's data.
#
# A good guess: the cache is kept by address, so that .../flickr/train-000.tar and .../coco/train-000.tar are two entries.
# What happens: the folder part of the address is dropped. Whoever comes second reads the other data set's shards, also in
#   later runs, also after shards were made anew under their old names.
# Source: webdataset.cache.url_to_cache_name (ndir=0) as the default of FileCache; url_to_name can be given to FileCache only.
# Who is hurt: mixtures of data sets whose shards bear the usual names (train-000000.tar), and shared cache folders.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 webdataset==1.0.2 accelerate==1.15.0

observe <<'PY'
import functools, http.server, io, os, tarfile, threading
import webdataset as wds

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

for name in ("coco", "flickr"):
    os.makedirs(name)
    with tarfile.open(f"{name}/train-000.tar", "w") as shard:
        member = tarfile.TarInfo("a.txt")
        member.size = len(name)
        shard.addfile(member, io.BytesIO(name.encode()))
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.makedirs("cache")
seen = {}
for cache in (None, "cache"):
    for name in ("coco", "flickr"):
        address = f"http://127.0.0.1:{server.server_port}/{name}/train-000.tar"
        seen[cache, name] = next(iter(wds.WebDataset(address, shardshuffle=False, cache_dir=cache)))["txt"].decode()
        print(f"{name}/train-000.tar over HTTP, cache_dir {cache}: the sample says {seen[cache, name]!r}")
print("files in the cache:", os.listdir("cache"))
assert [seen[None, "flickr"], seen["cache", "flickr"]] == ["flickr", "coco"]
PY
