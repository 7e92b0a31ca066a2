"""Batches from which an adapter's start is computed: small, never empty, the same for any number of ranks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import streams
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.errors import BadInput, BadSample
from tests.helpers.runs import tiny_vqa

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def ids(folder, ranks: Ranks, **sections) -> list[list[str]]:
    """Of the samples of the first batches, a little more than an epoch."""
    resolved = resolve.resolve(tiny_vqa.recipe(folder, **sections))
    batches = itertools.islice(streams.first_batches(resolved, ranks), 26)
    return [[i for i, w in zip(b.sample_id, b.weight.tolist(), strict=True) if w] for _, b in batches]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("first_batches")
    tiny_vqa.prepare(path)
    return path


def test_of_each_global_batch_there_are_at_most_sixteen(folder):
    for slots in (16, 17, 29):
        found = ids(folder, ALONE, data={"global_batch": slots})
        assert max(map(len, found)) <= streams.SLOTS


def test_micro_batches_of_padding_alone_are_left_out(folder):
    found = ids(folder, ALONE, data={"global_batch": 8, "last_batch": "pad"}, optim={"accumulation": 4})
    assert all(found) and len({i for batch in found for i in batch}) == 30


def test_another_rank_sees_the_same(folder):
    other = dataclasses.replace(ALONE, rank=1, world_size=2)
    assert ids(folder, other) == ids(folder, ALONE)


def test_data_of_which_no_sample_can_be_used_end_in_one_line(folder):
    resolved = resolve.resolve(tiny_vqa.recipe(folder))

    def refuse(*args):
        raise BadSample("field", "broken")

    for source in resolved.train:
        source.task.read = refuse
    with pytest.raises(BadInput, match="no sample of the first epoch can be used"):
        next(streams.first_batches(resolved, ALONE))
