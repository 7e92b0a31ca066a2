"""Samples that fail only together: the one that differs is named, wherever it stands, and the others continue."""

import numpy as np
import pytest
import torch

from mmpeft_ds.backbones.clip_bart.backbone import StoredGrid
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.packing import make_of_most, refused, spread
from mmpeft_ds.data.stream import Stream
from mmpeft_ds.errors import BadInput
from tests.helpers.data.tiny_shards import RawSample, source, write_shards

N = 24


def stacked(rows):
    return torch.stack([torch.zeros(row) for row in rows])


@pytest.mark.parametrize("place", [0, 3, 6])
def test_the_one_that_differs_is_refused_wherever_it_stands(place):
    widths = [4] * 7
    widths[place] = 5
    assert refused(widths, stacked) == [place]
    assert make_of_most(widths, stacked)[0].shape == (6, 4)


def test_of_two_the_one_that_differs_from_the_usual_ones_is_refused():
    for widths in ([4, 5], [5, 4]):
        assert refused(widths, stacked, lambda: [4, 5, 4]) == [widths.index(5)]
    assert refused([5, 5, 5, 4], stacked, lambda: [4, 4, 4]) == [0, 1, 2], "the data decides, not the batch"
    assert refused([-1], stacked, lambda: [4]) == [0]


def test_what_goes_with_everything_takes_no_side():
    def make(rows):
        return stacked([row for row in rows if row])

    def some(rows):
        return make(rows) if any(rows) else torch.zeros(0)

    assert refused([0, 4, 0, 5, 4, 0], some) == [3]


def test_one_too_many_is_refused_where_all_go_together_in_pairs():
    def make(numbers):
        if sum(numbers) > 10:
            raise ValueError("too long")
        return numbers

    assert make_of_most([4, 4, 4, 1], make) == ([4, 4, 1], [2])
    assert make_of_most([4, 11, 4, 1], make) == ([4, 4, 1], [1])


def test_a_fault_of_the_function_is_nobodys():
    def broken(rows):
        raise AssertionError("never works")

    assert refused([1, 2], broken) is None and refused([1, 2], broken, lambda: [3]) is None
    with pytest.raises(AssertionError, match="never works"):
        make_of_most([1, 2], broken)


@pytest.fixture(scope="module", params=[0, 13, N - 1])
def odd(request, tmp_path_factory):
    """Stored arrays of four rows, one of them of nine; all are fine alone."""
    number = request.param
    rows = [9 if i == number else 4 for i in range(N)]
    record = {"texts": ["what"], "answers": [1]}
    raw = [RawSample(f"s{i}", [], record, np.full((n, 3), i, np.float32)) for i, n in enumerate(rows)]
    return write_shards(tmp_path_factory.mktemp("odd") / "set", raw), f"toy/train-{number:09d}"


def collate_rows(images):
    return {"features": torch.stack(images)}


def collate_or_refuse(images):
    """As `clip_bart` does."""
    if len({image.shape for image in images}) > 1:
        raise BadInput("image features of one batch differ")
    return collate_rows(images)


def batches(manifest, collate=collate_rows, world_size=1, train=False, **options):
    given = source(manifest, image_transform=StoredGrid(3), collate_images=collate)
    options = DataOptions(**{"global_batch": 12, "workers": 0, **options})
    made = []
    for rank in range(world_size):
        stream = Stream([given], options, rank=rank, world_size=world_size, train=train)
        made += [batch for step in stream.epoch(0) for batch in step.micro]
        stream.close()
    return made


@pytest.mark.parametrize("collate", [collate_rows, collate_or_refuse])
@pytest.mark.parametrize("train", [False, True])
def test_a_stream_names_the_odd_sample_and_keeps_the_others(odd, collate, train):
    manifest, key = odd
    for world_size in (1, 2, 3):
        made = batches(manifest, collate, world_size, train)
        assert [(b[0], f"toy/{b[2]}") for batch in made for b in batch.bad] == [("collate", key)]
        good = [s for batch in made for s, w in zip(batch.sample_id, batch.weight.tolist(), strict=True) if w]
        assert len(good) == N - 1 and key not in good
        shapes = {batch.images["features"].shape[1:] for batch in made if any(batch.sample_id)}
        assert shapes == {(4, 3)}


@pytest.mark.slow
def test_workers_name_the_same_sample(odd):
    manifest, key = odd
    bad = [b for batch in batches(manifest, workers=2, global_batch=6) for b in batch.bad]
    assert [f"toy/{b[2]}" for b in bad] == [key] and bad[0][1].endswith(".tar")


def test_a_batch_in_which_the_odd_ones_are_the_majority_keeps_the_usual_one(tmp_path):
    rows = [9 if i in (0, 6, 12) else 4 for i in range(24)]  # slot s of a step takes sample 6 s + step
    record = {"texts": ["what"], "answers": [1]}
    raw = [RawSample(f"s{i}", [], record, np.zeros((n, 3), np.float32)) for i, n in enumerate(rows)]
    made = batches(write_shards(tmp_path / "set", raw), global_batch=4)
    assert made[0].weight.tolist() == [0, 0, 0, 1]
    assert sum(float(batch.weight.sum()) for batch in made) == 21


def test_a_sample_that_cannot_be_packed_is_bad_even_if_it_is_alone_in_its_batch(tmp_path):
    record = {"texts": ["what"], "answers": [1]}
    raw = [RawSample(f"s{i}", [], record, np.full((4, 3), i, np.float32)) for i in range(6)]

    def collate(images):
        if any(float(image[0, 0]) == 2 for image in images):
            raise ValueError("no two, please")
        return collate_rows(images)

    made = batches(write_shards(tmp_path / "set", raw), collate, global_batch=1)
    assert [batch.weight.tolist() for batch in made] == [[1], [1], [0], [1], [1], [1]]

    def broken(images):
        raise ValueError("never works")

    with pytest.raises(ValueError, match="never works"):
        batches(Manifest.load(tmp_path / "set"), broken, global_batch=1)


def test_more_images_than_the_model_tells_apart_are_a_bad_sample(tmp_path):
    record = {"texts": ["what"], "answers": [1]}
    raw = [RawSample(f"s{i}", [], record, np.zeros((1 + (i == 1), 4, 3), np.float32)) for i in range(4)]
    given = source(
        write_shards(tmp_path / "set", raw), image_transform=StoredGrid(3), collate_images=collate_rows, most_images=1
    )
    stream = Stream([given], DataOptions(global_batch=4, workers=0), train=False)
    (batch,) = next(iter(stream.epoch(0))).micro
    stream.close()
    assert batch.weight.tolist() == [1, 0, 1, 1] and batch.bad[0][0] == "images"


@pytest.mark.parametrize("sizes", [[1], [3, 4], [5] * 9, [100, 0, 1, 7]])
def test_the_usual_samples_come_from_all_over_the_shards(sizes):
    places = spread(sizes)
    assert places[0] == (0, 0) and len(set(places)) == len(places) <= 8
    assert all(0 <= sample < sizes[shard] for shard, sample in places)
    assert len(places) == min(sum(sizes), 8) or len(places) > 4
