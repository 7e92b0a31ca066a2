"""What a sample brings from outside costs no more than its bytes, and whatever is wrong with it is the sample's."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from data_prep import prepare, verify
from mmpeft_ds.data.manifest import Manifest, sample_key
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.parsing import MAX_NESTING, check_finite, json_object, json_objects, npy_array, one_sample
from mmpeft_ds.data.shards import ShardReader, image_names, members
from mmpeft_ds.data.stream import Stream
from mmpeft_ds.data.writer import PARTS, RawSample, write_shard
from mmpeft_ds.errors import BadInput, BadSample
from tests.helpers.data import streamed, tiny_shards


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tar(*infos: tarfile.TarInfo, data: bytes = b"") -> bytes:
    """A piece of tar with these headers, whatever they claim, and `data` after the last."""
    return b"".join(info.tobuf(tarfile.GNU_FORMAT) for info in infos) + data + bytes(-len(data) % 512)


def info(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    return made


@pytest.mark.parametrize(
    "data, word",
    [
        (b'{"text": "\\ud83d"}', "surrogate"),
        ('{"text": "\ud83d"}'.encode("utf-8", "surrogatepass"), "utf-8"),
        (b"[" * 100 + b"]" * 100, "list"),
        (b'{"a": ' + b"[" * MAX_NESTING + b"]" * MAX_NESTING + b"}", "nested deeper"),
        (b'{"n": ' + b"1" * 5000 + b"}", "digits"),
        (b"[1]", "not an object"),
        (b"{", "Expecting"),
    ],
)
def test_a_record_that_later_steps_could_not_handle_is_bad(data, word):
    with pytest.raises(BadSample, match=f"json: .*{word}"):
        json_object(data)


UNUSUAL = [
    b' {"a": 1} ',
    b'\xef\xbb\xbf{"a": 2}',
    '{"ü": "\\u00fc\\ud83d\\ude00"}'.encode(),
    b'{"a": [' + b"[1]," * 80 + b"[]]}",
]


def test_many_records_at_once_are_those_one_by_one():
    pieces = [b'{"a":{"b":[1,null,"x"]}}', *UNUSUAL, b"{}"]
    assert json_objects(map(memoryview, pieces)) == list(map(json_object, pieces))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"a":1}{"b":2}', b'{"a":1', b'{"a":"\\ud800"}', b'{"a":"\xff"}', b"[" * 10**5, b"1"]
)
def test_one_that_is_bad_among_many_is_bad_in_the_same_words(data):
    with pytest.raises(BadSample) as alone:
        json_object(data)
    with pytest.raises(BadSample) as among:
        json_objects([b'{"a":1}', data, b'{"c":3}'])
    assert (among.value.kind, str(among.value)) == (alone.value.kind, str(alone.value))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_that_are_not_finite_are_noticed_wherever_they_stand(dtype):
    good = np.array([[0, -0.0, 1], [np.finfo(dtype).max, np.finfo(dtype).min, np.finfo(dtype).tiny]], dtype)
    check_finite(good)
    check_finite(good[:0])
    for wrong in (np.inf, -np.inf, np.nan, -np.nan):
        for place in np.ndindex(good.shape):
            spoilt = good.copy()
            spoilt[place] = wrong
            with pytest.raises(BadSample, match="1 of 6 numbers are not finite"):
                check_finite(spoilt)
            with pytest.raises(BadSample):
                check_finite(np.asfortranarray(spoilt)[::-1])


def test_pairs_of_surrogates_and_brackets_in_texts_are_no_fault():
    assert json_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}
    brackets = "[" * 1000
    assert json_object(json.dumps({"a": brackets}).encode()) == {"a": brackets}
    inner = json_object(b'{"a": ' + b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1) + b"}")
    assert list(inner) == ["a"]


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((3, 2), ">f4")), np.ones(())]
)
def test_arrays_come_over_as_they_were(array):
    read = npy_array(npy(array))
    np.testing.assert_array_equal(read, array)
    assert read.flags["C_CONTIGUOUS"] and read.flags["WRITEABLE"] and torch.from_numpy(read).shape == np.shape(array)


@pytest.mark.parametrize(
    "data, word",
    [
        (npy(np.zeros(4)).replace(b"(4,)", b"(5,)"), r"claims \(5,\) float64, and 32 bytes follow"),
        (npy(np.zeros(4))[:-1], "31 bytes follow"),
        (npy(np.zeros(4)).replace(b"(4,)", b"(-1,"), "npy"),
        (b"PK\x03\x04" + bytes(60), "npy"),
        (npy(np.array(["text"])), "no plain numbers"),
        (npy(np.zeros(2, [("a", "f4")])), "no plain numbers"),
        (npy(np.array([1.0, np.nan])), "1 of 2 numbers are not finite"),
        (npy(np.array([np.inf], np.float16)), "not finite"),
    ],
)
def test_arrays_that_claim_more_than_there_is_or_no_finite_numbers_are_bad(data, word):
    with pytest.raises(BadSample, match=word):
        npy_array(data)


def test_a_member_that_claims_more_than_the_piece_holds_is_bad():
    sparse = info("k.json", 8, tarfile.GNUTYPE_SPARSE)
    for piece in (
        tar(info("k.json", 9), data=b"{}")[:516],
        tar(info("k.json", 1 << 40), data=b"{}"),
        tar(sparse, data=b"{}"),
        tar(*[info("k.json", 0, tarfile.GNUTYPE_LONGNAME)] * 40, data=b"{}"),
    ):
        with pytest.raises(BadSample, match="tar"):
            members(piece)


@pytest.mark.parametrize("name", ["a\nb.json", "\x1b[2Jk.json", "a\u202eb.json"])
def test_a_name_that_no_line_could_show_is_bad(name):
    with pytest.raises(BadSample, match="no printable name") as refused:
        members(tar(info(name, 2), data=b"{}"))
    assert str(refused.value).isprintable()


def test_an_image_number_of_many_digits_is_bad():
    assert image_names({"10.jpg": b"", "9.png": b"", "json": b""}) == ["9.png", "10.jpg"]
    with pytest.raises(BadSample, match="40 digits"):
        image_names({f"{'1' * 40}.jpg": b""})


def test_only_bad_input_passes_as_it_is():
    with pytest.raises(BadInput, match="a shard is gone"), one_sample():
        raise BadInput("a shard is gone")
    with pytest.raises(BadSample, match="memory: MemoryError"), one_sample():
        raise MemoryError


def test_a_sample_takes_no_more_bytes_than_allowed(tmp_path):
    manifest = tiny_shards.write_shards(tmp_path / "d", [tiny_shards.one_image(i) for i in range(5)])
    longest = int(manifest.offsets("train", 0)[:, 1].max())
    read = ShardReader(manifest, "train", max_sample_bytes=longest - 1).read([(0, i) for i in range(5)])
    assert "bytes" in {piece.kind for piece in read if isinstance(piece, BadSample)}

    def wide(image, generator):
        return {"pixels": [torch.zeros(1000), torch.zeros(1000)]}

    source = tiny_shards.source(manifest, image_transform=wide, collate_images=lambda images: {})
    for most, kinds in ((8000, []), (7999, ["bytes"] * 5)):
        stream = Stream([source], DataOptions(global_batch=5, workers=0, max_sample_bytes=max(most, longest)))
        stream.loader.options.max_sample_bytes = most
        (step,) = stream.epoch(0)
        assert [kind for kind, _, _ in step.micro[0].bad] == kinds


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_written_anew_during_a_run_ends_it(tmp_path, workers):
    manifest = tiny_shards.write_shards(tmp_path / "d", [tiny_shards.one_image(i) for i in range(12)], per_shard=12)
    path = tmp_path / "d" / manifest.shards("train")[0].file
    stream = Stream([tiny_shards.source(manifest)], DataOptions(global_batch=4, workers=workers, prefetch=1))
    stream.wait_for_workers()
    try:
        steps = stream.epoch(0)
        next(steps)
        path.write_bytes(path.read_bytes())  # the same bytes, and nobody could know
        with pytest.raises(BadInput, match="changed during the run"):
            list(steps)
            list(stream.epoch(1))
    finally:
        stream.close()


def test_a_sample_of_another_key_than_expected_ends_the_run(tmp_path):
    manifest = tiny_shards.write_shards(tmp_path / "d", [tiny_shards.one_image(i) for i in range(4)])
    path = tmp_path / "d" / manifest.shards("train")[0].file
    old, new = sample_key("train", 2).encode(), sample_key("train", 3).encode()
    data = bytearray(path.read_bytes())
    begin, length = manifest.offsets("train", 0)[2]
    piece = bytes(data[begin : begin + length]).replace(old, new)
    for at in range(0, length, 512):  # the sums of the headers with the other name
        if piece[at : at + len(new)] == new:
            head = tarfile.TarInfo.frombuf(bytes(data[begin + at : begin + at + 512]), "utf-8", "strict")
            head.name = head.name.replace(old.decode(), new.decode())
            piece = piece[:at] + head.tobuf(tarfile.USTAR_FORMAT) + piece[at + 512 :]
    data[begin : begin + length] = piece
    path.write_bytes(data)
    with pytest.raises(BadInput, match="train-000000003 where train-000000002 belongs"):
        streamed.run(manifest)


def test_stored_features_that_the_towers_did_not_make_are_bad(tmp_path):
    samples = [RawSample(f"s{i}", [], {"texts": [], "answers": []}, np.ones((1, 4), np.float32)) for i in range(3)]
    manifest = tiny_shards.write_shards(tmp_path / "d", samples)
    manifest.towers = {"key": "x", "image_width": 5}
    from mmpeft_ds.backbones.features.backbone import ViewTransform

    stream = Stream([tiny_shards.source(manifest, image_transform=ViewTransform(False))], DataOptions(workers=0))
    (step,) = stream.epoch(0)
    assert [kind for kind, _, _ in step.micro[0].bad] == ["features"] * 3


ODD = {
    "surrogate": {"captions": ["\ud83d"]},
    "nested": {"extra": json.loads("[" * MAX_NESTING + "]" * MAX_NESTING)},
    "type": {"questions": [{"question": "q", "answers": ["a"], "type": ["count"]}]},
}


@pytest.mark.parametrize("kind", ODD)
def test_preparation_refuses_what_training_could_not_read(tmp_path, kind):
    (tmp_path / PARTS).mkdir()
    with pytest.raises((BadInput, ValueError), match="cannot be stored"):
        write_shard(tmp_path, "toy", "train", 0, 0, [RawSample("odd", [], ODD[kind])])
    assert [path.name for path in tmp_path.rglob("*")] == [PARTS], "nothing is left of it"


@pytest.mark.parametrize("array", [np.array([[np.nan]]), np.zeros((1, 3))])
def test_preparation_refuses_features_that_are_not_finite_or_of_another_width(tmp_path, array):
    (tmp_path / PARTS).mkdir()
    samples = [RawSample("good", [], {}, np.zeros((2, 2))), RawSample("odd", [], {}, array)]
    with pytest.raises(BadInput, match="odd"):
        write_shard(tmp_path, "toy", "train", 0, 0, samples)


def test_a_line_of_deep_nesting_is_named_by_its_number(tmp_path, capsys):
    lines = ['{"caption": "a dog"}', '{"caption": "a cat", "extra_key": ' + "[" * 100_0 + "]" * 100_0 + "}"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadInput, match="1 problem,"):
        prepare.main(["jsonl", "--train", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
    assert "a.jsonl:2:" in capsys.readouterr().err


def test_verify_names_what_training_would_leave_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmpeft_ds.data.writer._checked", lambda sample, parts, widths: {})
    good = np.zeros((2, 4))
    samples = [RawSample(f"s{i}", [], {"captions": ["a"]}, good) for i in range(4)]
    samples += [RawSample("nan", [], {}, np.full((2, 4), np.nan)), RawSample("wide", [], {}, np.zeros((2, 5)))]
    samples += [RawSample(kind, [], ODD[kind], good) for kind in ("nested", "type")]
    tiny_shards.write_shards(tmp_path / "d", samples, per_shard=4)
    lines = verify.verify(str(tmp_path / "d"), list_bad=True, processes=1)
    assert Manifest.load(tmp_path / "d").samples("train") == len(samples)
    assert len(lines) == 4 and all(f"train-{i:09d}" in "".join(lines) for i in (4, 5, 6, 7)), lines
