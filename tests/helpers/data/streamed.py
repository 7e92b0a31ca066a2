"""Samples that a stream over `tiny_shards` yields, as rows that can be compared."""

import contextlib
from collections.abc import Iterator

import torch

from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.stream import Stream
from tests.helpers.data.tiny_shards import source


def rows(steps):
    """Step -> what every sample of positive weight brought along, in slot order."""
    found = {}
    for step in steps:
        for batch in step.micro:
            for j, owner in enumerate(batch.text_owner.tolist()):
                assert batch.weight[owner] == 1
                (image,) = (batch.image_owner == owner).nonzero().flatten().tolist()
                row = batch.sample_id[owner], batch.raw_texts[j], batch.targets["answer"][j].item()
                row += (batch.targets["draw"][j].item(), batch.images["pixels"][image].float().mean().item())
                found.setdefault(step.step, []).append(row)
    return found


def run(manifest, world_size=1, epoch=0, start=0, accumulation=1, train=True, seed=0, sources=None, **options):
    """The same as `rows`, over all ranks in rank order."""
    found = {}
    for rank in range(world_size):
        stream = Stream(
            sources or [source(manifest)],
            DataOptions(**{"global_batch": 8, "workers": 0, "shuffle_block": 20, **options}),
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            seed=seed,
            train=train,
        )
        stream.wait_for_workers()
        try:
            for step, part in rows(stream.epoch(epoch, start)).items():
                found.setdefault(step, []).extend(part)
        finally:
            stream.close()
    return found


def ids(found):
    return [row[0] for part in found.values() for row in part]


@contextlib.contextmanager
def decoding_threads(number: int) -> Iterator[None]:
    """In this block the process decodes in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
