"""Micro-batches gathered from feature shards are those that reading sample by sample makes."""

import functools
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmpeft_ds.data import feature_batches, feature_memory, writer
from mmpeft_ds.data.batch import Described, id_number
from mmpeft_ds.data.feature_columns import Columns, ShardColumns
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.shards import ShardReader
from mmpeft_ds.data.stream import Stream, StreamSource
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.data.transform import ImageTransform
from mmpeft_ds.errors import BadInput, BadSample
from tests.helpers.data import tiny_features

COUNT = 23


@dataclass(frozen=True)
class OneByOne(ImageTransform):
    """A view of the stored features by the sample's seed, which the stream must ask for sample by sample."""

    takes_features = True

    def __call__(self, features, generator):
        if features.dim() != 2:
            raise BadSample("features", "not (1 + V, D)")
        return features[1 + generator.initial_seed() % (len(features) - 1)]


@dataclass(frozen=True)
class Whole(OneByOne):
    """The same, for whole batches."""

    takes_one_row = True

    def row(self, rows, seed):
        return 1 + seed % (rows - 1)


def read(record, generator):
    """One caption, drawn; targets tell of the draw, and of what is in the record."""
    if record["label"] == "broken":
        raise BadSample("label", "broken")
    number = int(torch.randint(len(record["captions"]), (), generator=generator))
    return [Described(record["captions"][number], record["text"][number])], [(record["label"], number)]


def read_first(record, generator):
    """Nothing is drawn."""
    return [Described(record["captions"][0], record["text"][0])], [(record["label"], 0)]


def read_some(record, generator):
    """Drawn for every third sample alone."""
    return read(record, generator) if sum(map(ord, record["captions"][0])) % 3 == 0 else read_first(record, generator)


NOTHING = Described("", torch.zeros(tiny_features.TEXT_WIDTH))


def read_nothing(record, generator):
    """One object for all, but for a sample that comes late in the split."""
    text = Described("", torch.ones(tiny_features.TEXT_WIDTH)) if record["source_id"].endswith("17") else NOTHING
    return [text], [(record["label"], 0)]


def collate_images(images):
    return {"image_features": images if isinstance(images, Tensor) else torch.stack(images)}


def collate_texts(texts):
    return {"text_features": torch.stack([text.features for text in texts])}


def collate_targets(targets):
    return {"label": torch.tensor(targets)}


def batches(
    manifest, transform, world_size=1, epochs=(0, 1), train=True, read=read, subset=None, identify=False, **options
):
    """All micro-batches of all ranks; and how many of them were gathered."""
    functions = read, transform, collate_images, collate_texts, collate_targets
    source = StreamSource(manifest, "train", *functions, ("label",), subset=subset, identify=identify)
    options = DataOptions(**{"global_batch": 5, "workers": 0, "shuffle_block": 8, **options})
    found, gathered = [], 0
    for rank in range(world_size):
        stream = Stream([source], options, rank=rank, world_size=world_size, seed=3, train=train)
        gather = stream.loader.gathers[0]

        def counted(make, *args):
            nonlocal gathered
            result = make(*args)
            gathered += result is not None
            return result

        for name in ("make", "batch") if gather is not None else ():  # alone, or ahead with others
            setattr(gather, name, functools.partial(counted, getattr(gather, name)))
        for epoch in epochs:
            found += [batch for step in stream.epoch(epoch) for batch in step.micro]
        stream.close()
    return found, gathered


def gathering(manifest):
    """A stream of one rank that reads first captions, with rows of collated targets that are kept."""
    functions = read_first, Whole(), collate_images, collate_texts, collate_targets
    source = StreamSource(manifest, "train", *functions, ("label",), collates_by_row=True)
    return Stream([source], DataOptions(global_batch=5, workers=0, shuffle_block=8), seed=3)


def assert_equal(gathered, others):
    assert len(gathered) == len(others)
    for a, b in zip(gathered, others, strict=True):
        for name in ("weight", "image_owner", "text_owner"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert getattr(a, name).dtype == getattr(b, name).dtype
        for name in ("images", "texts", "targets"):
            mine, theirs = getattr(a, name), getattr(b, name)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine), name
        assert (a.sample_id, a.raw_texts, a.bad) == (b.sample_id, b.raw_texts, b.bad)
        assert a.count(len_of_texts) == b.count(len_of_texts)
        assert [plain(r) for r in a.records] == [plain(r) for r in b.records]


def len_of_texts(batch):
    return float(len(batch.text_owner))


def plain(record):
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in record.items()}


def write(tmp_path, dtype=np.float32, change=lambda samples: None, **options):
    samples = [tiny_features.sample(i, dtype) for i in range(COUNT)]
    change(samples)
    return tiny_features.write_features(tmp_path / "set", samples, **options)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("read", [read, read_first, read_some, read_nothing])
def test_gathered_batches_are_those_read_one_by_one(tmp_path, dtype, world_size, read):
    manifest = write(tmp_path, dtype)
    gathered, count = batches(manifest, Whole(), world_size, epochs=(0, 1, 0), read=read)
    others, none = batches(manifest, OneByOne(), world_size, epochs=(0, 1, 0), read=read)
    assert_equal(gathered, others)
    assert none == 0
    assert count == sum(bool(sum(batch.weight)) for batch in gathered)  # every batch with a sample
    assert gathered[-1].images["image_features"].dtype == torch.from_numpy(np.zeros(0, dtype)).dtype


def test_samples_with_equal_features_show_one_picture_whichever_way_they_are_read(tmp_path):
    def repeat(samples):
        samples[7].features = samples[2].features.copy()

    manifest = write(tmp_path, change=repeat)
    for transform in (Whole(), OneByOne()):
        found, _ = batches(manifest, transform, epochs=(0,), identify=True)
        shown = {i: r["picture"] for b in found for i, r in zip(b.sample_id, b.records, strict=True) if r}
        assert len(shown) == COUNT and len(set(shown.values())) == COUNT - 1
        assert shown["toy/train-000000002"] == shown["toy/train-000000007"]
    assert not any("picture" in r for b in batches(manifest, Whole(), epochs=(0,))[0] for r in b.records)


def test_the_draw_of_a_sample_changes_with_the_epoch(tmp_path):
    manifest = write(tmp_path)
    first, _ = batches(manifest, Whole(), epochs=(0,))
    second, _ = batches(manifest, Whole(), epochs=(1,))
    rows = [{name: (row.tolist(), text) for b in found for name, row, text in triples(b)} for found in (first, second)]
    assert rows[0].keys() == rows[1].keys()
    assert any(rows[0][name][0] != rows[1][name][0] for name in rows[0])
    assert any(rows[0][name][1] != rows[1][name][1] for name in rows[0])


def triples(batch):
    names = [batch.sample_id[owner] for owner in batch.image_owner.tolist()]
    return zip(names, batch.images["image_features"], batch.raw_texts, strict=True)


def test_evaluation_and_subsets_are_gathered_too(tmp_path):
    manifest = write(tmp_path)
    keys = [f"train-{i:09d}" for i in (1, 2, 5, 9, 14, 20, 21)]
    subset = Subset("toy", "train", keys)
    for options in ({"train": False}, {"subset": subset}, {"train": False, "subset": subset}):
        gathered, count = batches(manifest, Whole(), 2, **options)
        assert_equal(gathered, batches(manifest, OneByOne(), 2, **options)[0])
        assert count > 0
    seen = {name for batch in gathered for name in batch.sample_id if name}
    assert seen == {f"toy/{key}" for key in keys}


def spoil_shape(samples):
    samples[3].features = samples[3].features[0, 0]


def spoil_record(samples):
    samples[6].record["label"] = "broken"


def spoil_fields(samples):
    del samples[17].record["label"]


def spoil_captions(samples):
    samples[9].arrays = {}


@pytest.mark.parametrize("spoil", [spoil_shape, spoil_record, spoil_fields, spoil_captions])
def test_a_bad_sample_is_bad_in_the_same_way(tmp_path, spoil, caplog, monkeypatch):
    monkeypatch.setattr(
        writer, "_checked", lambda *_: {}
    )  # ours refuses to write what another program may have written
    manifest = write(tmp_path, change=spoil)
    gathered, count = batches(manifest, Whole(), 2)
    others, _ = batches(manifest, OneByOne(), 2)
    assert_equal(gathered, others)
    assert sum(len(batch.bad) for batch in gathered) == 2  # once an epoch
    assert 0 < count < len(gathered)  # its batch mates came the slow way, the others did not


@pytest.mark.parametrize(("place", "bad"), [(0, 2), (100, 2), (130, 2), (150, 2), (512, 2), (600, 0)])
def test_damaged_bytes_are_noticed_as_they_are_one_by_one(tmp_path, place, bad, caplog):
    manifest = write(tmp_path)
    path = tmp_path / "set" / "toy-train-000001.tar"
    data = bytearray(path.read_bytes())
    begin = int(manifest.offsets("train", 1)[2][0])
    data[begin + place] ^= 0x15
    path.write_bytes(data)
    gathered, _ = batches(manifest, Whole(), 2)
    others, _ = batches(manifest, OneByOne(), 2)
    assert_equal(gathered, others)
    assert sum(len(batch.bad) for batch in gathered) == bad  # inside a text of the record nothing can tell


def test_a_shortened_shard_gives_bad_samples_and_a_missing_one_stops(tmp_path, caplog):
    manifest = write(tmp_path)
    path = tmp_path / "set" / "toy-train-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(manifest.offsets("train", 1)[2][0]) + 700])
    gathered, _ = batches(manifest, Whole())
    assert_equal(gathered, batches(manifest, OneByOne())[0])
    assert {kind for batch in gathered for kind, _, _ in batch.bad} == {"read"}
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="toy-train-000001"):
        batches(manifest, Whole())
    path.unlink()
    with pytest.raises(BadInput, match="toy-train-000001"):
        batches(manifest, Whole())


@pytest.mark.parametrize("room", [0, 1, 9])
def test_what_is_remembered_changes_nothing(tmp_path, monkeypatch, room):
    manifest = write(tmp_path)
    monkeypatch.setattr("mmpeft_ds.data.feature_memory.REMEMBERED", room)
    for each in (read, read_first):
        gathered, count = batches(manifest, Whole(), 2, epochs=(0, 1, 2), read=each)
        assert_equal(gathered, batches(manifest, OneByOne(), 2, epochs=(0, 1, 2), read=each)[0])
        assert count > 0


def test_a_text_that_is_one_object_for_all_is_kept_once_until_another_comes(tmp_path):
    memory = feature_memory.Memory(5, None)
    other, two, last = Described("x"), np.array([2, 0]), np.array([4])
    memory.add_plain(two, ["c", "a"], [{}, {}], [NOTHING, NOTHING], [0, 1])
    assert memory.common == {"texts": NOTHING, "raw": ""}
    assert memory.columns(memory.place[two])[2] == [NOTHING, NOTHING]
    memory.add_plain(last, ["e"], [{}], [other], [2])
    assert memory.common == {}
    names, _, texts, raw = memory.columns(memory.place[[4, 0, 2]])
    assert (names, [text is other for text in texts], raw) == (["e", "a", "c"], [True, False, False], ["x", "", ""])


def test_what_is_remembered_is_bounded_in_bytes(tmp_path, monkeypatch):
    manifest = write(tmp_path)
    others, _ = batches(manifest, OneByOne(), 2, read=read_first)
    sizes = []
    for most in (0, 2000, 2**20):
        monkeypatch.setattr(feature_memory, "REMEMBERED_BYTES", most)
        stream = gathering(manifest)
        for step in stream.epoch(0):
            del step
        memory = stream.loader.gathers[0]._memory
        sizes.append(memory.count)
        assert memory.bytes <= most
        assert_equal(batches(manifest, Whole(), 2, read=read_first)[0], others)
    assert sizes[0] == 0 < sizes[1] < sizes[2] == COUNT


def test_worker_processes_gather_the_same(tmp_path):
    manifest = write(tmp_path)
    source = (manifest, "train", read, Whole(), collate_images, collate_texts, collate_targets, ("label",))
    stream = Stream([StreamSource(*source)], DataOptions(global_batch=5, workers=0, shuffle_block=8), seed=3)
    next(stream.epoch(0))
    copy = pickle.loads(pickle.dumps(stream.loader))  # as it travels to a worker, with its files open
    requests = list(stream._requests(1, 0))
    assert_equal([copy(r) for r in requests], [stream.loader(r) for r in requests])


def test_columns_say_where_everything_is(tmp_path):
    manifest = write(tmp_path, change=spoil_captions)
    split = Columns(ShardReader(manifest, "train"))
    columns = split.shards([2, 0])[2]
    assert columns.good.tolist() == [True] * 4
    assert (columns.rows, columns.width) == (1 + tiny_features.VIEWS, tiny_features.WIDTH)
    addresses = split.address[[11, 8, 1]] + np.array([0, 2, 1]) * columns.width * columns.dtype.itemsize
    rows = split.rows(np.array([2, 2, 0]), addresses, columns.dtype, columns.width)
    assert rows.tolist() == [tiny_features.image_features(i)[view].tolist() for i, view in ((11, 0), (8, 2), (1, 1))]
    assert columns.text(0).tolist() == tiny_features.text_features(8).tolist()
    assert columns.text(1) is None


def test_no_row_outside_of_the_file_of_its_shard_is_read(tmp_path):
    manifest = write(tmp_path)
    split = Columns(ShardReader(manifest, "train"))
    columns, one = split.shards([1])[1], np.array([1])
    size = columns.width * columns.dtype.itemsize
    first, last = columns.start, columns.start + len(columns.bytes) - size
    assert split.rows(one[[0, 0]], np.array([first, last]), columns.dtype, columns.width).shape == (2, columns.width)
    for address in (first - 1, last + 1, 0, -(2**62)):
        with pytest.raises(BadInput, match=r"toy-train-000001\.tar: features of a sample would lie outside") as error:
            split.rows(one[[0, 0]], np.array([first, address]), columns.dtype, columns.width)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(BadInput, match="toy-train-000000"):  # which is not open
        split.rows(np.array([0]), np.array([first]), columns.dtype, columns.width)
    split.close()
    with pytest.raises(BadInput, match="toy-train-000001"):
        split.rows(one, np.array([first]), columns.dtype, columns.width)


def test_a_column_that_names_another_place_ends_the_run_in_one_line(tmp_path):
    manifest = write(tmp_path)
    stream = gathering(manifest)
    list(stream.epoch(0))
    stream.loader.gathers[0].columns.address[[6, 7]] += 10**6  # those of shard 1
    with pytest.raises(BadInput, match=r"toy-train-000001\.tar: features of a sample would lie outside"):
        list(stream.epoch(1))


@dataclass(frozen=True)
class Beyond(OneByOne):
    """It names a row behind the stored ones, of which the next sample's bytes would be read."""

    takes_one_row = True

    def row(self, rows, seed):
        return rows + 0 * seed


def test_a_row_that_is_not_stored_is_not_read(tmp_path):
    manifest = write(tmp_path)
    found, gathered = batches(manifest, Beyond(), read=read_first)
    assert gathered == 0
    assert_equal(found, batches(manifest, OneByOne(), read=read_first)[0])


def test_mapped_shards_keep_no_descriptor_and_cannot_be_changed(tmp_path):
    manifest = tiny_features.write_features(
        tmp_path / "many", [tiny_features.sample(i) for i in range(40)], per_shard=1
    )
    before = len(os.listdir("/proc/self/fd"))
    path = Path(manifest.path(manifest.shards("train")[0].file))
    columns = [
        ShardColumns(manifest.path(shard.file), manifest.offsets("train", i), [f"train-{i:09d}"])
        for i, shard in enumerate(manifest.shards("train"))
    ]
    assert len(os.listdir("/proc/self/fd")) < before + 10 and all(one.good.all() for one in columns)
    with pytest.raises(ValueError, match="read-only"):
        columns[0].bytes[0] = 1
    assert columns[0].bytes.tobytes() == path.read_bytes()


def test_no_more_bytes_of_rows_are_read_ahead_than_stated_and_what_is_read_stays_the_same(tmp_path, monkeypatch):
    manifest = write(tmp_path)
    row, read_at_a_time = 4 * tiny_features.WIDTH, []
    original = Columns.rows

    def rows(self, shards, addresses, dtype, width):
        if width == tiny_features.WIDTH:  # without those that are only checked
            read_at_a_time.append(len(addresses))
        return original(self, shards, addresses, dtype, width)

    monkeypatch.setattr(Columns, "rows", rows)
    expected, _ = batches(manifest, OneByOne(), read=read_first)
    for most, together in (
        (1, 5),
        (11 * row, 10),
        (2**20, 15),
    ):  # a micro-batch has 5 samples, all but one are asked for
        monkeypatch.setattr(feature_batches, "READ", most)
        read_at_a_time.clear()
        assert_equal(batches(manifest, Whole(), read=read_first)[0], expected)
        assert max(read_at_a_time) == together
    resumed = [batch for step in gathering(manifest).epoch(0, start_step=2) for batch in step.micro]
    assert_equal(resumed, expected[2 : len(expected) // 2])


def test_rows_of_collated_targets_that_are_kept_are_those_that_collating_each_batch_gives(tmp_path):
    manifest = write(tmp_path)
    stream = gathering(manifest)
    kept = [batch for epoch in (0, 1) for step in stream.epoch(epoch) for batch in step.micro]
    assert stream.loader.gathers[0]._memory.collated
    known = [batch for batch in kept if batch.id_numbers is not None]
    assert known and all(b.id_numbers.tolist() == list(map(id_number, b.sample_id)) for b in known)
    assert_equal(kept, batches(manifest, OneByOne(), read=read_first)[0])
    assert all(torch.equal(batch.changes, torch.zeros(len(batch.raw_texts), 3, dtype=torch.int64)) for batch in kept)
