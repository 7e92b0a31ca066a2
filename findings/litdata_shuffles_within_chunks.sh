#!/usr/bin/env bash
# litdata: StreamingDataset(shuffle=True) shuffles the order of chunks and the samples within each, and never mixes two chunks.
#
# A good guess: a batch is drawn from the whole data set, or from a buffer of many chunks as in webdataset and MosaicML's streaming.
# What happens: all samples of one chunk come one after the other in every epoch, in a new order. A data set that was written sorted by
#   class, source or length gives batches of one class, source or length for ever; chunks hold 64 MB by default.
# Source: litdata.streaming.shuffle.FullShuffle (permutation of the chunks' intervals, then of the indices inside an interval).
# Who is hurt: contrastive losses, whose negatives are the other samples of the batch, and graphs over a batch: which samples meet was
#   decided when the data set was written.
. "$(dirname "$0")/_lib.sh"
pins litdata==0.2.76 torch==2.13.0 numpy==2.4.6

observe <<'PY'
from litdata import StreamingDataLoader, StreamingDataset, optimize

CHUNK = 10

def record(number):
    return {"number": number}

if __name__ == "__main__":
    optimize(fn=record, inputs=list(range(100)), output_dir="numbers", chunk_size=CHUNK, num_workers=1, verbose=False)
    orders = []
    loader = StreamingDataLoader(StreamingDataset("numbers", shuffle=True, seed=1), batch_size=5)
    for epoch in range(3):
        orders.append([int(n) for batch in loader for n in batch["number"]])
        chunks = [{n // CHUNK for n in orders[-1][i : i + CHUNK]} for i in range(0, 100, CHUNK)]
        print(f"epoch {epoch}: {orders[-1][:25]} ...; chunks in each run of {CHUNK} samples: {[sorted(c) for c in chunks]}")
        assert sorted(orders[-1]) == list(range(100)) and all(len(c) == 1 for c in chunks)
    assert orders[0] != orders[1] != orders[2]
PY
