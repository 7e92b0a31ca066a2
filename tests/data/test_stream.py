"""The stream end to end: real shards, ranks as plain objects in one process."""

import threading

import numpy as np
import pytest
import torch

from mmpeft_ds.data.batch import STORED
from mmpeft_ds.data.decode import decode
from mmpeft_ds.data.frozen_store import FrozenStore, Place, StoreSpec, shard_number
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.stream import Stream
from mmpeft_ds.data.transform import ImageTransform, hooks_of
from mmpeft_ds.errors import BadInput
from tests.helpers.data.images import encoded
from tests.helpers.data.streamed import decoding_threads, ids, rows, run
from tests.helpers.data.tiny_shards import RawSample, one_image, read, source, transform, write_shards

N = 45


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("stream") / "toy", [one_image(i) for i in range(N)])


def _refuses(image, generator):
    raise AssertionError("an image was transformed")


@pytest.mark.parametrize("workers", [0, 1])
def test_images_with_stored_values_are_neither_decoded_nor_transformed_and_nothing_else_changes(
    toy, tmp_path, workers
):
    spec = StoreSpec(str(tmp_path / "key"), "key")
    store = FrozenStore(spec)
    store.prepare({})
    for shard in toy.shards("train"):
        for i in range(shard.samples):
            value = [{"image_features": torch.full((1, 2), float(i))}]
            store.write(Place(shard_number(shard.sha256), shard.samples, i), value, [""])
    options = DataOptions(global_batch=8, workers=workers)
    plain = Stream([source(toy)], options)
    expected = [batch for step in plain.epoch(1, 2) for batch in step.micro]
    plain.close()
    stream = Stream([source(toy, image_transform=_refuses)], options)
    stream.keep_frozen(spec)
    stream.wait_for_workers()
    found = [batch for step in stream.epoch(1, 2) for batch in step.micro]
    stream.close()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.sample_id == other.sample_id and not one.bad and one.images == {}
        assert torch.equal(one.image_owner, other.image_owner) and torch.equal(one.weight, other.weight)
        assert all(torch.equal(one.targets[name], other.targets[name]) for name in other.targets)
        numbers = [int(name.rpartition("-")[2]) for name in one.sample_id if name]
        assert one.image_places[:, 3].tolist() == [number % 7 for number in numbers]
        assert (one.image_places[:, 0] == STORED).all()


@pytest.mark.parametrize("world_size", [2, 3, 8, 96])
def test_global_batch_is_the_same_for_every_rank_count(toy, world_size):
    assert run(toy, world_size) == run(toy)
    assert run(toy, world_size, accumulation=3) == run(toy)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_global_batch_is_the_same_for_every_worker_count(toy, workers):
    for world_size, accumulation in ((1, 1), (2, 3)):
        assert run(toy, world_size, accumulation=accumulation, workers=workers) == run(toy)


def test_global_batch_is_the_same_for_every_number_of_decoding_threads(toy, monkeypatch):
    decoded_by = []

    def seen(*args, **given):
        decoded_by.append(threading.current_thread())
        return decode(*args, **given)

    monkeypatch.setattr("mmpeft_ds.data.decode.decode", seen)
    with decoding_threads(1):
        expected = run(toy)
    assert set(decoded_by) == {threading.main_thread()}
    for threads in (2, 5):
        decoded_by.clear()
        with decoding_threads(threads):
            assert run(toy) == expected
        assert len(decoded_by) == N and set(decoded_by) - {threading.main_thread()}
    assert run(toy, workers=1, worker_threads=3) == expected


def _texts_and_a_half(batch):
    return float(batch.text_weight.sum()) + 0.5


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_counts_what_a_step_asks_of_a_batch_where_it_knows_the_weight_of_the_loss(toy, workers):
    stream = Stream([source(toy, loss_weight=_texts_and_a_half)], DataOptions(global_batch=8, workers=workers))
    stream.wait_for_workers()
    batches = [batch for step in stream.epoch(0) for batch in step.micro]
    stream.close()
    assert all(batch.counts == batch.count(_texts_and_a_half) for batch in batches)
    assert sum(batch.counts.loss_weight for batch in batches) == N + 0.5 * len(batches)
    assert all(
        batch.counts is None
        for step in Stream([source(toy)], DataOptions(global_batch=8)).epoch(0)
        for batch in step.micro
    )


def test_every_sample_once_an_epoch_in_another_order_each_time(toy):
    first, second = ids(run(toy, epoch=0)), ids(run(toy, epoch=1))
    assert sorted(first) == sorted(second) == [f"toy/train-{i:09d}" for i in range(N)]
    assert first != second
    assert ids(run(toy, seed=1)) != first


def test_evaluation_sees_every_sample_once_in_the_same_place_every_epoch(toy):
    first = run(toy, train=False, last_batch="drop")
    assert sorted(ids(first)) == [f"toy/train-{i:09d}" for i in range(N)]
    assert run(toy, train=False, epoch=5) == first
    # slot 0 goes through the beginning of the split
    assert [first[t][0][0] for t in range(5)] == [f"toy/train-{t:09d}" for t in range(5)]


def batches_of(manifest, world_size, **settings):
    """Batches of an evaluation in their order, as ids, and how many steps each rank took."""
    options = DataOptions(workers=0, **settings)
    ranks = [
        Stream([source(manifest)], options, rank=rank, world_size=world_size, train=False)
        for rank in range(world_size)
    ]
    steps = [list(rank.epoch(0)) for rank in ranks]
    in_turn = [step.micro[0].sample_id for at in zip(*steps, strict=True) for step in at]
    return [batch for batch in in_turn if any(batch)], {len(of_rank) for of_rank in steps}


@pytest.mark.parametrize("world_size", [2, 3, 7, 20])
def test_batches_of_an_evaluation_hold_the_same_samples_for_every_rank_count(toy, world_size):
    alone, (many,) = batches_of(toy, 1, global_batch=32, evaluation_batch=6)
    found, (count,) = batches_of(toy, world_size, global_batch=32, evaluation_batch=6)
    assert found == alone and len(alone) == many == 8 and {len(batch) for batch in alone} == {6}
    assert count == -(-many // world_size)


def test_a_batch_of_an_evaluation_is_at_most_the_global_batch(toy):
    assert batches_of(toy, 2, global_batch=4) == batches_of(toy, 2, global_batch=4, evaluation_batch=4)


def test_coupled_samples_are_evaluated_by_global_batches_over_all_ranks(toy):
    options = DataOptions(workers=0, global_batch=10, evaluation_batch=2, evaluation_order="stored")
    streams = [Stream([source(toy)], options, rank=rank, world_size=2, train=False, coupled=True) for rank in range(2)]
    first, second = (next(stream.epoch(0)).micro[0].sample_id for stream in streams)
    assert len(first) == len(second) == 5 and not set(first) & set(second)


def test_a_data_set_smaller_than_the_batch_is_padded_or_refused(toy):
    found = run(toy, 3, global_batch=64)
    assert len(found) == 1 and len(set(ids(found))) == N
    with pytest.raises(BadInput, match="global_batch"):
        run(toy, global_batch=64, last_batch="drop")


def test_padding_has_no_weight_and_equal_shape_on_all_ranks(toy):
    ranks = [Stream([source(toy)], DataOptions(global_batch=7, workers=0), rank=r, world_size=9) for r in range(9)]
    steps = [list(r.epoch(0)) for r in ranks]
    assert {len(s) for s in steps} == {ranks[0].steps_per_epoch(0)}
    assert {len(b.weight) for s in steps for step in s for b in step.micro} == {1}
    total = sum(b.weight.sum() for s in steps for step in s for b in step.micro)
    assert total == N
    empty = steps[0][0].micro[0]
    assert empty.sample_id == [""] and empty.modalities == frozenset() and empty.images == {} and empty.bad == []


@pytest.mark.parametrize("start", [1, 3, 5])
def test_resume_at_a_step_equals_the_uninterrupted_run_also_with_other_ranks_and_workers(toy, start):
    whole = {s: part for s, part in run(toy, 2, epoch=1).items() if s >= start}
    for world_size, workers in ((2, 0), (1, 0), (3, 0), (1, 2)):
        assert run(toy, world_size, epoch=1, start=start, workers=workers) == whole


def test_resume_reads_no_consumed_sample(toy, monkeypatch):
    from mmpeft_ds.data.shards import ShardReader

    wanted = []
    original = ShardReader.each
    monkeypatch.setattr(ShardReader, "each", lambda self, w: wanted.extend(w) or original(self, w))
    run(toy, start=4)
    remaining, wanted[:] = list(wanted), []
    whole = run(toy)
    assert len(remaining) == sum(len(whole[s]) for s in whole if s >= 4)
    assert remaining == wanted[-len(remaining) :]


def test_choices_depend_on_seed_epoch_and_sample_alone(toy):
    def draws(**how):
        return {row[0]: row[3] for part in run(toy, **how).values() for row in part}

    assert draws() == draws(world_size=3, shuffle_block=5, global_batch=4)
    assert len(set(draws().values())) > 40
    assert draws() != draws(epoch=1) and draws() != draws(seed=1)
    assert draws(train=False) == draws(train=False, epoch=3)


def test_one_source_a_step_and_all_sources_in_proportion(toy, tmp_path):
    other = write_shards(tmp_path / "other", [one_image(i) for i in range(16)], name="other")
    sources = [source(toy), source(other)]
    found = run(None, 2, sources=sources)
    assert len(found) == 8
    for part in found.values():
        assert len({row[0].split("/")[0] for row in part}) == 1
    assert len(set(ids(found))) == N + 16
    for world_size, start in ((1, 0), (3, 0), (1, 5)):
        expected = {s: part for s, part in found.items() if s >= start}
        assert run(None, world_size, sources=sources, start=start) == expected
    sources[1].weight = 4
    names = [part[0][0].split("/")[0] for part in run(None, sources=sources).values()]
    # 6 and 2 own steps, weights 1 and 4: shares 6 to 8 of 8 steps
    assert names.count("other") == 5


def test_an_epoch_can_be_left_and_another_begun(toy):
    for workers in (0, 2):
        stream = Stream([source(toy)], DataOptions(global_batch=8, workers=workers, shuffle_block=20))
        stream.wait_for_workers()
        left = stream.epoch(0)
        next(left)
        assert rows(stream.epoch(1, 2)) == {s: part for s, part in run(toy, epoch=1).items() if s >= 2}
        stream.close()


def test_remote_shards_give_the_same_stream(toy):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(toy.dir, "/stream/toy", recursive=True)
    try:
        assert run(Manifest.load("memory://stream/toy"), 2) == run(toy)
    finally:
        memory.rm("/stream", recursive=True)


def test_text_only_two_image_video_and_ragged_samples_pack_into_one_batch(tmp_path):
    def pictures(*seeds):
        return [("png" if s % 2 else "jpg", encoded(s, "PNG" if s % 2 else "JPEG")) for s in seeds]

    samples = [
        RawSample("text only", [], {"texts": ["a", "bb"], "answers": [0, 1]}),
        RawSample("two images", pictures(1, 2), {"texts": ["ccc"], "answers": [2]}),
        RawSample("video", pictures(*range(10, 22)), {"texts": ["dddd"], "answers": [3]}),
        RawSample("image only", pictures(3), {"texts": [], "answers": []}),
        RawSample("many questions", pictures(4), {"texts": list("xyz"), "answers": [4, 5, 6]}),
    ]
    manifest = write_shards(tmp_path / "mixed", samples)
    (step,) = Stream([source(manifest)], DataOptions(global_batch=6, workers=0), train=False).epoch(0)
    (batch,) = step.micro
    kinds = {record.get("source_name"): slot for slot, record in enumerate(batch.records)}
    assert batch.weight.tolist() == [0, 1, 1, 1, 1, 1]
    owner = [kinds[name] for name in ("two images", "two images", *["video"] * 12, "image only", "many questions")]
    assert batch.image_owner.tolist() == owner
    assert batch.raw_texts == ["a", "bb", "ccc", "dddd", "x", "y", "z"]
    owner = [kinds[name] for name in ("text only", "text only", "two images", "video", *["many questions"] * 3)]
    assert batch.text_owner.tolist() == owner
    assert batch.targets["answer"].tolist() == list(range(7))
    assert batch.images["pixels"].shape == (16, 3, 16, 16)
    # Frames stand in their order, ten after nine.
    from mmpeft_ds.data.decode import decode, resize

    frames = torch.stack([resize(decode(data), (16, 16)) for _, data in pictures(*range(10, 22))])
    assert torch.equal(batch.images["pixels"][2:14], frames)


def test_features_become_tensors_of_the_record(tmp_path):
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    sample = RawSample("features", [], {"texts": ["a"], "answers": [0]}, features)
    (step,) = Stream([source(write_shards(tmp_path / "f", [sample]))], DataOptions(global_batch=1, workers=0)).epoch(0)
    assert np.array_equal(step.micro[0].records[0]["features"].numpy(), features)


def test_scaled_decoding_needs_a_transform_that_says_its_size(toy):
    seen = []

    class Sized(ImageTransform):
        min_size = (16, 16)

        def __call__(self, image, generator):
            seen.append(tuple(image.shape[1:]))
            return transform(image, generator)

    run(toy, sources=[source(toy, image_transform=Sized())], decode="scaled")
    assert set(seen) == {(20, 30)}
    seen.clear()
    run(toy, sources=[source(toy, image_transform=Sized())], decode="full")
    assert set(seen) == {(40, 60)}
    assert hooks_of(transform).min_size is None
    assert run(toy, decode="scaled") == run(toy)


def test_read_of_the_toy_task_really_draws():
    a, b = (read({"texts": ["x"], "answers": [1]}, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert a != b
