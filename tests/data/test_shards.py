"""Reading samples by byte range, safely, and checking shards at start."""

import errno
import fcntl
import hashlib
import io
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
import webdataset

from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.shards import ShardReader, _plain_members, check_pipe, members, verify_shards
from mmpeft_ds.data.tar import TarWriter, header
from mmpeft_ds.errors import BadInput, BadSample
from tests.helpers.data.tiny_shards import RawSample, one_image, write_shards


def tar(entries: dict[str, bytes], format=tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "toy", [one_image(i) for i in range(20)])


def test_ranges_hold_exactly_the_samples_that_tarfile_finds(toy):
    reader = ShardReader(toy, "train")
    for number, shard in enumerate(toy.shards("train")):
        with tarfile.open(toy.path(shard.file)) as archive:
            whole = {m.name: archive.extractfile(m).read() for m in archive}
        found = {}
        for piece in reader.read([(number, i) for i in range(shard.samples)]):
            key, parts = members(piece)
            assert _plain_members(piece) is not None
            found.update({f"{key}.{extension}": data for extension, data in parts.items()})
        assert found == whole
    reader.close()


def test_few_files_stay_open(toy, monkeypatch):
    monkeypatch.setattr("mmpeft_ds.data.shards.OPEN_FILES", 1)
    reader = ShardReader(toy, "train")
    keys = [members(piece)[0] for piece in reader.read([(0, 0), (1, 0), (2, 0), (0, 1)])]
    assert keys == [f"train-{i:09d}" for i in (0, 7, 14, 1)]
    assert len(reader._files) == 1
    reader.close()
    assert not reader._files


def test_long_and_foreign_names_are_left_to_tarfile():
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        name = "a" * 90 + "/" + "b" * 60
        piece = tar({name + ".json": b"{}", name + ".0.jpg": b"x"}, format)
        assert members(piece) == (name, {"json": b"{}", "0.jpg": b"x"})


def test_extension_is_all_behind_the_first_dot_of_the_last_part():
    assert members(tar({"v1.2/k.0.jpg": b"x"})) == ("v1.2/k", {"0.jpg": b"x"})


@pytest.mark.parametrize(
    "piece",
    [
        b"",
        b"\0" * 1024,
        b"no tar at all" * 100,
        tar({"a.json": b"{}", "b.json": b"{}"}),
        tar({"a.pyd": pickle.dumps(1)}),
        tar({"a.json": b"{}", "a.0.pickle": pickle.dumps(1)}),
        tar({"a.json": b"{}" * 600})[:700],
    ],
    ids=["empty", "zeros", "text", "two keys", "pyd", "pickle", "cut"],
)
def test_what_is_not_one_clean_sample_is_bad(piece):
    with pytest.raises(BadSample) as caught:
        members(piece)
    assert caught.value.kind == "tar"


def test_a_flipped_byte_in_a_header_is_noticed():
    piece = bytearray(tar({"a.json": b"{}"}))
    piece[130] ^= 1
    with pytest.raises(BadSample):
        members(bytes(piece))


def test_remote_ranges_and_cache_give_the_same_bytes(toy, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(toy.dir, "/remote/toy", recursive=True)
    try:
        remote = Manifest.load("memory://remote/toy")
        wanted = [(2, 5), (0, 0), (1, 3)]
        expected = ShardReader(toy, "train").read(wanted)
        assert ShardReader(remote, "train").read(wanted) == expected
        cache = tmp_path / "cache"
        assert ShardReader(remote, "train", str(cache)).read(wanted) == expected
        assert len(list(cache.iterdir())) == 3
        # The copies suffice once they are there.
        memory.rm("/remote/toy", recursive=True)
        assert ShardReader(remote, "train", str(cache)).read(wanted) == expected
        with pytest.raises(BadInput, match="not found"):
            ShardReader(remote, "train").read(wanted)
    finally:
        if memory.exists("/remote"):
            memory.rm("/remote", recursive=True)


def test_a_damaged_copy_never_enters_the_cache(toy, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(toy.dir, "/remote/toy", recursive=True)
    try:
        remote = Manifest.load("memory://remote/toy")
        file = remote.shards("train")[0].file
        data = bytearray(memory.cat_file(f"/remote/toy/{file}"))
        data[1000] ^= 1
        memory.pipe_file(f"/remote/toy/{file}", bytes(data))
        with pytest.raises(BadInput, match="sha256"):
            ShardReader(remote, "train", str(tmp_path)).read([(0, 0)])
        assert not list(tmp_path.iterdir())
    finally:
        memory.rm("/remote", recursive=True)


def test_start_check_finds_missing_short_and_altered_shards(tmp_path):
    manifest = write_shards(tmp_path / "toy", [one_image(i) for i in range(40)])
    files = [tmp_path / "toy" / shard.file for shard in manifest.shards("train")]
    for mode in ("none", "size", "sha256"):
        assert verify_shards(manifest, "train", mode) == []
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-512])
    altered = bytearray(files[4].read_bytes())
    altered[700] ^= 1
    files[4].write_bytes(altered)

    assert verify_shards(manifest, "train", "none") == []
    assert len(verify_shards(manifest, "train", "size")) == 2
    found = verify_shards(manifest, "train", "sha256")
    assert len(found) == 3
    for line, file, word in zip(found, (files[1], files[2], files[4]), ("missing", "bytes", "sha256"), strict=True):
        assert file.name in line and word in line and "\n" not in line
    for ranks in (2, 3, 8, 96):
        parts = [verify_shards(manifest, "train", "sha256", r, ranks) for r in range(ranks)]
        assert sorted(line for part in parts for line in part) == sorted(found)


def test_a_shard_that_vanishes_later_stops_with_one_line_and_a_short_one_gives_bad_samples(tmp_path):
    manifest = write_shards(tmp_path / "toy", [one_image(i) for i in range(14)])
    first, second = (tmp_path / "toy" / shard.file for shard in manifest.shards("train"))
    first.write_bytes(first.read_bytes()[:3000])
    found = ShardReader(manifest, "train").read([(0, 0), (0, 6)])
    assert isinstance(found[1], BadSample) and found[1].kind == "read"
    second.unlink()
    with pytest.raises(BadInput, match=second.name) as caught:
        ShardReader(manifest, "train").read([(1, 0)])
    assert "\n" not in str(caught.value)


def test_pipes_are_refused_unless_allowed():
    with pytest.raises(BadInput, match="allow_pipe"):
        check_pipe("pipe:rm -rf /", allow_pipe=False)
    check_pipe("pipe:cat x", allow_pipe=True)
    check_pipe("s3://bucket/pipe:x", allow_pipe=False)


def test_features_written_as_npy_come_back(tmp_path):
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    manifest = write_shards(tmp_path / "toy", [RawSample("f", [], {"label": 1}, features)])
    key, parts = members(ShardReader(manifest, "train").read([(0, 0)])[0])
    assert np.array_equal(np.load(io.BytesIO(parts["npy"]), allow_pickle=False), features)


def test_shards_are_those_of_webdatasets_writer_to_the_byte(tmp_path):
    """`TarWriter` stands in for webdataset.ShardWriter, whose import would bring torch into every worker."""
    rows = [{"jpg": b"\xff\xd8" + bytes(range(256)) * (i + 1), "json": b'{"n":%d}' % i} for i in range(5)]
    rows.append({"1.png": b"second", "0.png": b"first", "npy": b"x" * 10_300, "json": b"{}"})  # over a tar's record
    rows.append({"bin": b"z" * (3 << 20), "json": b"{}"})  # over what is written at a time
    with (tmp_path / "ours.tar").open("wb", buffering=0) as stream, TarWriter(stream) as ours:
        for i, row in enumerate(rows):
            ours.add(f"train-{i:07d}", row)
        size, digest, offsets = ours.close()
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), verbose=0, mtime=0, compress=False) as theirs:
        for i, row in enumerate(rows):
            theirs.write({"__key__": f"train-{i:07d}", **row})
    data = (tmp_path / "ours.tar").read_bytes()
    assert data == (tmp_path / "0.tar").read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    for i, (begin, length) in enumerate(offsets.tolist()):
        key, parts = members(data[begin : begin + length])
        assert key == f"train-{i:07d}" and parts == rows[i]


def refusing_flags(*arguments):
    if arguments[1] == fcntl.F_SETFL and arguments[2] & os.O_DIRECT:
        raise OSError(errno.EINVAL, "not here")
    return REAL_FCNTL(*arguments)


def refusing_whole_chunks(file, data):
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "blocks of another size")
    return REAL_WRITE(file, data)


REAL_FCNTL, REAL_WRITE = fcntl.fcntl, os.write
FILE_SYSTEMS = {
    "all is cached": ("mmpeft_ds.data.tar.fcntl.fcntl", refusing_flags),
    "blocks of another size": ("mmpeft_ds.data.tar.os.write", refusing_whole_chunks),
    "a part is written at a time": (
        "mmpeft_ds.data.tar.os.write",
        lambda file, data: REAL_WRITE(file, data[: 1 << 20]),
    ),
}


@pytest.mark.parametrize("system", FILE_SYSTEMS)
def test_a_shard_has_the_same_bytes_on_file_systems_that_refuse_to_bypass_the_cache(tmp_path, monkeypatch, system):
    def written(name):
        with (tmp_path / name).open("wb", buffering=0) as stream, TarWriter(stream) as ours:
            for number in range(7):
                ours.add(f"train-{number}", {"bin": bytes([number]) * (3 << 19)})
            size, digest, _ = ours.close()
        data = (tmp_path / name).read_bytes()
        assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
        return data

    wanted = written("here")
    monkeypatch.setattr(*FILE_SYSTEMS[system])
    assert written("there") == wanted


def test_what_cannot_be_written_ends_a_shard_with_the_systems_error(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmpeft_ds.data.tar.os.write", full)
    with (tmp_path / "t").open("wb", buffering=0) as stream, TarWriter(stream) as ours:
        with pytest.raises(OSError, match="No space left"):
            for number in range(9):
                ours.add(f"train-{number}", {"bin": bytes(1 << 20)})
            ours.close()


@pytest.mark.parametrize(
    ("name", "size"),
    [("a.jpg", 0), ("train-000000000.0.jpg", 8**11 - 1), ("é" * 50, 511), ("d" * 60 + "/" + "x" * 80, 7)],
)
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uname, info.gname = size, 0o444, 0, "bigdata", "bigdata"
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)
