"""The other loaders of the loader benchmark."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._loader_work import BATCH, RESIZED, SEED, SHUFFLE, our_224, pil_224, stack, timed  # noqa: E402


def webdataset(loader, dir, workers, world_size, mode, step):
    import webdataset as wds

    work = work_of(loader)
    urls = sorted(str(p) for p in folder_of(loader, dir).glob("photos-train-*.tar"))
    begin = time.perf_counter()
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=SEED, nodesplitter=wds.split_by_node)
        .shuffle(SHUFFLE, seed=SEED)
        .map(lambda s: (s["__key__"], work(s["jpg"])))
        .batched(BATCH, collation_fn=lambda pairs: ([k for k, _ in pairs], stack([i for _, i in pairs])))
    )
    batches = wds.WebLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    if mode == "rate":
        return timed(batches, begin)
    # It keeps no position: a resume reads (and decodes) everything before it again.
    keys = []
    for i, (batch, _) in enumerate(batches):
        if i == step:
            first = time.perf_counter() - begin
        if i >= step:
            keys += batch
        if len(keys) >= 100:
            return {"keys": keys[:100], "first": first}
    raise AssertionError("fewer batches than asked for")


def energon(loader, dir, workers, world_size, mode, step):
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    work, source = work_of(loader), folder_of(loader, dir)

    @edataclass
    class Decoded(Sample):
        image: np.ndarray

    @stateless
    def cook(sample: dict) -> Decoded:
        return Decoded(**basic_sample_keys(sample), image=work(sample["jpg"]))

    class Work(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

        def batch(self, samples):
            return [s.__key__ for s in samples], stack([s.image for s in samples])

        def encode_batch(self, batch):
            return batch

    def open_loader(rank=0):
        config = WorkerConfig(rank=rank, world_size=world_size, num_workers=workers, seed_offset=SEED)
        dataset = get_train_dataset(
            link_for_energon(source),
            worker_config=config,
            batch_size=BATCH // world_size,
            shuffle_buffer_size=SHUFFLE,
            max_samples_per_sequence=100,
            task_encoder=Work(),
        )
        return get_savable_loader(dataset, prefetch_factor=4)

    begin = time.perf_counter()
    if mode == "rate":
        # It repeats for ever: take as many batches as an epoch has.
        shards = json.loads((source / "manifest.json").read_text())["splits"]["train"]
        return timed(itertools.islice(open_loader(), sum(s["samples"] for s in shards) // BATCH), begin)
    state_file = source / f"energon-{workers}-{world_size}.state"
    import torch

    if mode == "keys":
        loader = open_loader()
        batches = iter(loader)
        for _ in range(step):
            next(batches)
        torch.save(loader.save_state_rank(), state_file)
        return {"keys": [key for _ in range(3) for key in next(batches)[0]][:100]}
    state = torch.load(state_file, weights_only=False)
    begin = time.perf_counter()
    loader = open_loader()
    loader.restore_state_rank(state)
    batches = iter(loader)
    keys = list(next(batches)[0])
    first = time.perf_counter() - begin
    while len(keys) < 100:
        keys += next(batches)[0]
    return {"keys": keys[:100], "first": first, "state_bytes": state_file.stat().st_size}


def link_for_energon(dir: Path) -> Path:
    """A folder with links to the same tars and energon's own index beside them."""
    folder = dir / "energon"
    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        folder.mkdir(exist_ok=True)
        for tar in dir.glob("photos-train-*.tar"):
            if not (folder / tar.name).exists():
                os.link(tar, folder / tar.name)
        command = [str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive", "--force-overwrite"]
        command += ["--no-progress", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def litdata(loader, dir, workers, world_size, mode, step):
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import Cache

    source, folder = folder_of(loader, dir), folder_of(loader, dir) / "litdata"
    if not (folder / "index.json").exists():
        cache = Cache(str(folder), chunk_bytes=1 << 24)
        for number, (key, data) in enumerate(stored_pictures(source)):
            cache[number] = {"key": key, "jpg": data}
        cache.done()
        cache.merge()
    begin = time.perf_counter()
    dataset = StreamingDataset(str(folder), shuffle=True, seed=SEED)
    collate = Collate(loader)
    prefetch = {"prefetch_factor": 4} if workers else {}
    return timed(
        StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate, **prefetch), begin
    )


def mosaic(loader, dir, workers, world_size, mode, step):
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    source, folder = folder_of(loader, dir), folder_of(loader, dir) / "mosaic"
    if not (folder / "index.json").exists():
        with MDSWriter(out=str(folder), columns={"key": "str", "jpg": "bytes"}) as writer:
            for key, data in stored_pictures(source):
                writer.write({"key": key, "jpg": data})
    begin = time.perf_counter()
    dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=BATCH)
    prefetch = {"prefetch_factor": 4} if workers else {}
    batches = DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=Collate(loader), **prefetch)
    return timed(batches, begin)


class Collate:
    """Decodes and resizes the samples of a batch, in the worker, as a data set's own transform would."""

    def __init__(self, loader: str):
        self.work = work_of(loader)

    def __call__(self, samples: list[dict[str, Any]]):
        return [s["key"] for s in samples], stack([self.work(bytes(s["jpg"])) for s in samples])  # litdata's are views


def work_of(loader: str):
    return our_224 if "our decoder" in loader else pil_224


def folder_of(loader: str, dir: Path) -> Path:
    return dir / RESIZED if RESIZED in loader else dir


def stored_pictures(dir: Path) -> Iterator[tuple[str, bytes]]:
    """Key and JPEG of every sample of the shards, in their order."""
    import tarfile

    for path in sorted(dir.glob("photos-train-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    yield member.name.removesuffix(".jpg"), archive.extractfile(member).read()
