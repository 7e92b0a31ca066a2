"""Manifests: reading gives what was written, byte offsets, travel to workers, and refusals."""

import json
import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mmpeft_ds.data.manifest import Manifest, local_path, sample_key
from mmpeft_ds.data.parts import finished_part, part_path
from mmpeft_ds.data.writer import RawSample, members, write_manifest, write_shard
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import sha256


def raw(i, images=(), features=None):
    record = {"questions": [{"question": "é" * (i + 1), "answers": ["yes" if i % 2 else "no"]}], "size": i}
    return RawSample(f"name.{i}", list(images), record, features)


@pytest.fixture
def made(tmp_path):
    """Two shards of train (3 + 2 samples), one of val."""
    (tmp_path / ".parts").mkdir()
    parts = {
        "train": [
            write_shard(tmp_path, "toy", "train", 0, 0, [raw(i) for i in range(3)]),
            write_shard(tmp_path, "toy", "train", 1, 3, [raw(i) for i in range(3, 5)]),
        ],
        "val": [write_shard(tmp_path, "toy", "val", 0, 0, [raw(9)])],
    }
    write_manifest(tmp_path, "toy", "MIT", {"name": "t", "options": {}}, 3, parts, ["yes", "no"], "train")
    return tmp_path


def test_a_manifest_reads_back_what_was_written(made):
    m = Manifest.load(made)
    assert (m.name, m.licence, m.dir, m.samples("train"), m.samples("val")) == ("toy", "MIT", str(made), 5, 1)
    assert [s.file for s in m.shards("train")] == ["toy-train-000000.tar", "toy-train-000001.tar"]
    assert m.labels == ["yes", "no"] and m.label_counts == [2, 3]
    assert m.fields["train"]["questions[].question"] == {"type": "str", "present": 5, "min": 1, "mean": 3.0, "max": 5}
    assert m.fields["train"]["size"]["mean"] == 2.0
    m.statistics["k"] = {"mean": [0.1], "std": [1 / 3], "count": 5}
    m.save(made)
    again = Manifest.load(made)
    assert again == m and again.statistics["k"]["std"][0] == 1 / 3
    assert sorted(p.name for p in made.iterdir() if p.name.endswith(".tmp")) == []


def test_offsets_of_the_second_shard_begin_anew(made):
    m = Manifest.load(made)
    offsets = m.offsets("train", 1)
    assert offsets.dtype == np.int64 and offsets.shape == (2, 2)
    data = (made / "toy-train-000001.tar").read_bytes()
    for i, (begin, length) in enumerate(offsets.tolist()):
        assert data[begin:].startswith(sample_key("train", 3 + i).encode())
        assert length % 512 == 0
    assert offsets[0, 0] == 0 and offsets[1, 0] == offsets[0, 1]


def test_a_manifest_travels_to_workers_without_its_table(made):
    m = Manifest.load(made)
    m.offsets("train", 0)
    assert np.array_equal(pickle.loads(pickle.dumps(m)).offsets("train", 1), m.offsets("train", 1))


def test_it_loads_through_fsspec(made):
    memory = fsspec.filesystem("memory")
    for path in made.iterdir():
        if path.is_file():
            memory.pipe_file(f"/toy/{path.name}", path.read_bytes())
    m = Manifest.load("memory://toy")
    assert np.array_equal(m.offsets("train", 1), Manifest.load(made).offsets("train", 1))
    assert local_path(m.path("x.tar")) is None and local_path(Manifest.load(f"file://{made}").dir) == str(made)


def break_index(made):
    (made / "toy-train.index.npy").write_bytes(b"x" * 100)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(schema=99), "schema 99 is newer"),
        (lambda d: d.pop("splits"), "damaged"),
        (lambda d: d["splits"]["train"][0].update(file="../../etc/passwd"), "damaged"),
        (lambda d: d["splits"]["train"][0].update(samples=0), "damaged"),
        (lambda d: d["splits"]["train"][0].update(sha256="abc"), "damaged"),
        (lambda d: d["splits"]["train"][0].update(samples=10**30), "damaged"),
        (lambda d: d["splits"]["train"][0].update({"a\nb": 1}), "damaged"),
        (lambda d: d["index"].pop("val"), "damaged"),
        (lambda d: d["index"]["val"].update(sha256=5), "damaged"),
        (lambda d: d["index"]["val"].update(file="/tmp/x.npy"), "damaged"),
        (lambda d: d.update(name="A.b"), "damaged"),
        (lambda d: d.update(label_counts=[1]), "damaged"),
        (lambda d: d.update(surprise=1), "damaged"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(made, change, says):
    path = made / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(BadInput, match=says) as error:
        Manifest.load(made)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_truncated_and_unreachable_are_refused(made, tmp_path):
    with pytest.raises(BadInput, match="prepare the data set first"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="cannot be read"):
        Manifest.load("nosuchprotocol://x")
    with pytest.raises(BadInput, match=r"no split 'test'. Known: train, val"):
        Manifest.load(made).shards("test")
    text = (made / "manifest.json").read_text()
    (made / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(BadInput, match="damaged"):
        Manifest.load(made)


@pytest.mark.parametrize("name", ["manifest.json", "side file"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(made, name, kind):
    path = made / (Manifest.load(made).index["train"].file if name == "side file" else name)
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(BadInput, match=f"{path.name}: cannot be read .*is a pipe or a device"):
        Manifest.load(made).offsets("train", 0)


def test_an_altered_or_missing_side_file_is_refused(made):
    break_index(made)
    with pytest.raises(BadInput, match="sha256"):
        Manifest.load(made).offsets("train", 0)
    (made / "toy-train.index.npy").unlink()
    with pytest.raises(BadInput, match="not found"):
        Manifest.load(made).offsets("train", 0)


def test_a_side_file_of_another_length_is_refused(made):
    raw = json.loads((made / "manifest.json").read_text())
    raw["splits"]["train"][1]["samples"] = 7
    (made / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match=r"expected int64 \(10, 2\)"):
        Manifest.load(made).offsets("train", 0)


def test_members_are_named_by_their_place_and_format():
    assert set(members(raw(0, [("JPEG", b"a")]))) == {"json", "jpg"}
    assert members(raw(0, [("png", b"a"), ("jpg", b"b"), ("tiff", b"c")])) == {
        "json": members(raw(0))["json"],
        "0.png": b"a",
        "1.jpg": b"b",
        "2.tif": b"c",
    }
    assert json.loads(members(raw(0))["json"])["source_name"] == "name.0"
    with pytest.raises(ValueError, match="exe"):
        members(raw(0, [("exe", b"a")]))


def test_a_finished_shard_counts_only_while_its_bytes_are_right(made):
    file = "toy-train-000000.tar"
    assert finished_part(made, file).shard.samples == 3
    part_path(made, file).write_text("{")
    assert finished_part(made, file) is None
    shard = made / "toy-train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert finished_part(made, shard.name) is None


def test_headers_hold_no_trace_of_the_machine(made):
    import tarfile

    with tarfile.open(made / "toy-train-000000.tar") as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "bigdata", "bigdata", 0o444)
    }
    assert Path(members[0].name).suffix == ".json"


@pytest.mark.parametrize(
    "place", [(0, 0, -512), (0, 1, -1), (0, 1, 0), (2, 1, 2**63 - 1), (4, 0, 2**63 - 512), (4, 0, 10**6)]
)
def test_ranges_outside_of_their_shard_are_refused_though_the_hash_is_right(made, place):
    *at, value = place
    info = Manifest.load(made).index["train"]
    table = np.load(made / info.file)
    table[tuple(at)] = value
    np.save(made / info.file, table)
    resealed(made, info.file)
    with pytest.raises(BadInput, match=f"sample {at[0]} .* lies outside of toy-train-00000{at[0] // 3}.tar"):
        Manifest.load(made).offsets("train", 0)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x09\x00{'shape': (", b"[[0, 1]]"])
def test_a_side_file_that_is_no_array_is_refused_though_the_hash_is_right(made, content):
    info = Manifest.load(made).index["train"]
    (made / info.file).write_bytes(content)
    resealed(made, info.file)
    with pytest.raises(BadInput, match=f"{info.file}: no array") as refused:
        Manifest.load(made).offsets("train", 0)
    assert "\n" not in str(refused.value)


def resealed(folder: Path, file: str) -> None:
    """The manifest with the hash of the side file of train as it is now."""
    raw = json.loads((folder / "manifest.json").read_text())
    raw["index"]["train"]["sha256"] = sha256(folder / file)
    (folder / "manifest.json").write_text(json.dumps(raw))
