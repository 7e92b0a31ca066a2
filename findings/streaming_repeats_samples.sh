#!/usr/bin/env bash
# mosaicml-streaming: an epoch serves some samples twice where the canonical nodes do not divide their number; len() does not count them.
#
# A good guess: every sample comes once in an epoch, or the last ones are left out, and len(dataset) says how many come.
# What happens: every canonical node gets equally many samples, and what is missing is filled with samples of its neighbour: 10 samples
#   on 4 nodes come as 12, two of them twice. len() says 10. Which ones are repeated depends on num_canonical_nodes alone.
# Source: streaming.base.partition.orig.get_partitions_orig (and relaxed), StreamingDataset.__len__ and __iter__.
# Who is hurt: scores over a validation set: a mean over what arrives counts some samples twice, differently for another number of nodes.
. "$(dirname "$0")/_lib.sh"
no_deps mosaicml-streaming==0.13.0
pins torch==2.13.0 numpy==2.1.3 pillow==13.0.0 brotli==1.2.1 catalogue==2.0.10 filelock==4.3.1 python-snappy==0.7.3 pyyaml==6.0.4 requests==2.34.2 \
    tqdm==4.70.1 transformers==4.57.6 xxhash==3.8.2 zstd==1.5.7.2

observe <<'PY'
import sys, types
from collections import Counter
import transformers

# torchvision has no build for a CPU torch; the package imports it for its labelled pictures only, which are not used here.
for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchvision.datasets"].VisionDataset = object
sys.modules["torchvision.transforms.functional"].to_tensor = None

from streaming import MDSWriter, StreamingDataset

with MDSWriter(out="data", columns={"i": "int"}) as writer:
    for i in range(10):
        writer.write({"i": i})
seen = {}
for nodes in (1, 2, 4, 8):
    dataset = StreamingDataset(local="data", batch_size=1, shuffle=False, num_canonical_nodes=nodes)
    counts = Counter(sample["i"] for sample in dataset)
    twice = sorted(i for i, count in counts.items() if count > 1)
    print(f"{nodes} canonical nodes: len {len(dataset)}, {sum(counts.values())} samples came, twice: {twice}")
    seen[nodes] = len(dataset), sum(counts.values()), len(counts)
assert seen == {1: (10, 10, 10), 2: (10, 10, 10), 4: (10, 12, 10), 8: (10, 16, 10)}
PY
