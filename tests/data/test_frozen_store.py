"""Records of the store of frozen values: whole or missing, whoever writes, and whatever happens to the files."""

from __future__ import annotations

import dataclasses
import errno
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from mmpeft_ds.data import frozen_store
from mmpeft_ds.data.frozen_store import FrozenStore, Place, StoreSpec
from mmpeft_ds.errors import BadInput

SAMPLES = 5
SHARD = frozen_store.shard_number("c0ffee" * 10 + "beef")


def opened(folder, key: str = "k" * 32, **spec) -> FrozenStore:
    store = FrozenStore(StoreSpec(str(folder / key), key, **spec))
    store.prepare({"weights": key})
    return store


def place(sample: int) -> Place:
    return Place(SHARD, SAMPLES, sample)


def values(sample: int, dtype=torch.float32) -> list[dict]:
    """Of two images, the second of another shape."""
    g = torch.Generator().manual_seed(sample)
    return [{"image_features": torch.randn(n, 7, generator=g).to(dtype)} for n in (1, 3)]


def same(found: list[dict] | None, expected: list[dict]) -> bool:
    pairs = zip(found or [], expected, strict=True)
    return all(torch.equal(a["image_features"], b["image_features"]) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_process_reads_what_was_written_to_the_bit(tmp_path, dtype):
    writer, reader = opened(tmp_path), opened(tmp_path)
    assert reader.find(place(2)) is None and reader.read(place(2)) is None
    writer.write(place(2), values(2, dtype), ["", "<2>"])
    assert reader.find(place(2)) == ["", "<2>"]
    assert same(reader.read(place(2)), values(2, dtype))
    assert reader.read(place(2))[0]["image_features"].dtype == dtype
    assert reader.read(place(1)) is None


def test_one_flipped_bit_anywhere_in_a_record_makes_it_missing_and_it_can_be_written_anew(tmp_path):
    store = opened(tmp_path)
    store.write(place(0), values(0), ["", ""])
    store.write(place(1), values(1), ["", ""])
    file = next((tmp_path / store.spec.key).glob("values-*.bin"))
    whole = file.read_bytes()
    for at in (0, 5, 64, len(whole) // 2 - 70):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        assert FrozenStore(store.spec).read(place(0)) is None, f"byte {at}"
        assert same(FrozenStore(store.spec).read(place(1)), values(1))
    again = opened(tmp_path)
    again.write(place(0), values(0), ["", ""])
    assert same(FrozenStore(store.spec).read(place(0)), values(0))


def test_records_of_another_key_or_sample_are_not_taken(tmp_path):
    mine, other = opened(tmp_path), opened(tmp_path, "f" * 32)
    other.write(place(0), values(9), ["", ""])
    for file in (tmp_path / other.spec.key).iterdir():
        if file.name != frozen_store.DESCRIPTION:
            (tmp_path / mine.spec.key / file.name).write_bytes(file.read_bytes())
    assert mine.read(place(0)) is None
    index = next((tmp_path / other.spec.key).glob("*.index"))
    entries = bytearray(index.read_bytes())
    entries[32:64] = entries[:32]  # the entry of sample 0 in place of sample 1
    index.write_bytes(entries)
    reader = FrozenStore(other.spec)
    assert same(reader.read(place(0)), values(9)) and reader.read(place(1)) is None


def test_a_directory_that_describes_other_weights_is_refused_in_one_line(tmp_path):
    store = opened(tmp_path)
    with pytest.raises(BadInput, match=r"key\.json: describes values of other weights .* Remove "):
        FrozenStore(store.spec).prepare({"weights": "others"})


def test_a_writer_that_was_killed_within_a_record_costs_that_record_alone(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.write(place(0), values(0), ["", ""])
    monkeypatch.setattr(store, "_enter", lambda *_: None)  # killed between the record and its entry
    store.write(place(1), values(1), ["", ""])
    assert store.read(place(1)) is None
    successor = opened(tmp_path)
    successor.write(place(1), values(1), ["", ""])
    reader = FrozenStore(store.spec)
    assert same(reader.read(place(0)), values(0)) and same(reader.read(place(1)), values(1))


def test_a_full_disk_stops_the_writing_but_not_the_reading(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.write(place(0), values(0), ["", ""])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(frozen_store.os, "pwrite", full)
    store.write(place(1), values(1), ["", ""])
    assert "No space left" in store.full
    monkeypatch.undo()
    store.write(place(2), values(2), ["", ""])
    assert same(store.read(place(0)), values(0)) and store.read(place(1)) is None and store.read(place(2)) is None


def test_the_limit_holds_for_the_directory_of_all_keys(tmp_path):
    opened(tmp_path, "a" * 32).write(place(0), values(0), ["", ""])
    used = frozen_store.size_of(tmp_path)
    store = opened(tmp_path, limit=used + 100)
    store.write(place(0), values(0), ["", ""])
    assert "engine.cache_frozen.limit" in store.full and store.read(place(0)) is None
    roomy = opened(tmp_path, limit=10 * used)
    roomy.write(place(0), values(0), ["", ""])
    assert same(roomy.read(place(0)), values(0)) and not roomy.full


def test_the_size_is_known_before_anything_is_written(tmp_path):
    store = opened(tmp_path)
    meta = [{"image_features": v["image_features"].to("meta")} for v in values(0)]
    store.write(place(0), values(0), ["", ""])
    written = sum(f.stat().st_size for f in (tmp_path / store.spec.key).glob("values-*.bin"))
    assert frozen_store.record_bytes(meta) == written + 32


def _write_all(spec: StoreSpec, first: int) -> None:
    store = FrozenStore(spec)
    for sample in range(first, SAMPLES):
        store.write(place(sample), values(sample), ["", ""])


def test_processes_that_write_the_same_samples_at_once_do_not_harm_each_other(tmp_path):
    spec = opened(tmp_path).spec
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(_write_all, [spec] * 3, [0, 1, 0]))
    store = FrozenStore(dataclasses.replace(spec))
    assert all(same(store.read(place(i)), values(i)) for i in range(SAMPLES))
    assert len(list((tmp_path / spec.key).glob("values-*.bin"))) == 3


def test_few_files_stay_open_however_many_shards_and_writers_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_store, "OPEN", 8)
    places = [Place(number, 1, 0) for number in range(1, 60)]
    for place in places:
        one = opened(tmp_path)  # so that each has a file of values of its own
        one.write(place, values(place.shard), ["", ""])
        one.close()
    store, before = opened(tmp_path), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for place in places:
            assert same(store.read(place), values(place.shard))
    assert len(os.listdir("/proc/self/fd")) <= before + 8
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before
