"""verify.py finds damaged shards, and show.py draws samples."""

import json
import tarfile
from dataclasses import replace

import pytest
from PIL import Image

from data_prep import prepare, show, verify
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import sha256


@pytest.fixture
def shards(jsonl, tmp_path):
    path = jsonl(*[{"image": f"{i % 6}.png", "question": f"q{i}?", "answer": "yes"} for i in range(12)])
    out = tmp_path / "out"
    prepare.main(["jsonl", "--out", str(out), "--train", str(path), "--samples-per-shard", "4", "--processes", "1"])
    return out


def problems(out, capsys, *argv):
    capsys.readouterr()
    code = verify.main([str(out), "--processes", "1", *argv])
    lines = capsys.readouterr().out.splitlines()
    assert code == (2 if len(lines) > 1 else 0)
    return lines[:-1]


def at(shard, text):
    return shard.read_bytes().index(text)


def test_intact_shards_have_no_problem(shards, capsys):
    assert problems(shards, capsys) == []


def test_a_key_that_an_earlier_version_left_aside_is_told(shards, capsys):
    manifest = Manifest.load(shards)
    count = {"type": "str", "present": 12, "min": 5, "mean": 5, "max": 5}
    manifest.fields["train"] |= {"extra.image_path": count, "extra.split": count, "extra.frames[]": count}
    manifest.save(shards)
    assert verify.main([str(shards), "--processes", "1"]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert "split train" in note and "'image_path'" in note and "looks like image" in note


def test_a_flipped_byte_is_found_wherever_it_is(shards, capsys):
    shard = shards / "jsonl-train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # in the padding at the end: no sample is hurt
    shard.write_bytes(data)
    (line,) = problems(shards, capsys)
    assert line.startswith("jsonl-train-000001.tar: has sha256 ")


def test_a_truncated_tar_is_found_with_the_samples_it_lost(shards, capsys):
    shard = shards / "jsonl-train-000002.tar"
    begin = int(Manifest.load(shards).offsets("train", 2)[2, 0])
    shard.write_bytes(shard.read_bytes()[: begin + 100])
    size, samples = problems(shards, capsys)
    assert f"has {begin + 100:,} bytes" in size
    assert "2 bad samples, first train-000000010" in samples
    _, first, second = problems(shards, capsys, "--list-bad")
    assert "train-000000010" in first and "train-000000011" in second


def test_a_missing_shard_and_an_altered_side_file_are_found(shards, capsys):
    (shards / "jsonl-train-000000.tar").unlink()
    (line,) = problems(shards, capsys)
    assert "cannot be read" in line
    index = shards / "jsonl-train.index.npy"
    index.write_bytes(index.read_bytes()[:-8] + b"\0" * 8)
    assert any("index.npy: sha256" in line for line in problems(shards, capsys))


def test_a_text_in_the_place_of_an_image_is_found_although_the_hash_is_right(shards, capsys):
    shard = shards / "jsonl-train-000000.tar"
    data = bytearray(shard.read_bytes())
    begin = at(shard, b"\x89PNG")
    data[begin : begin + 8] = b"no image"
    shard.write_bytes(data)
    _rehash(shards, shard)
    (line,) = problems(shards, capsys)
    assert "first train-000000000: image: not an image" in line


def test_images_that_training_leaves_out_are_named(jsonl, tmp_path, capsys):
    Image.effect_noise((40, 40), 99).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-300])
    Image.new("RGB", (300, 1)).save(tmp_path / "strip.png")
    names = ("0.png", "cut.png", "strip.png")
    data = jsonl(*({"image": name, "caption": "x"} for name in names))
    out = tmp_path / "data"
    prepare.main(["jsonl", "--out", str(out), "--train", str(data), "--processes", "1"])
    capsys.readouterr()
    (aspect,) = problems(out, capsys, "--list-bad")
    assert "train-000000002: aspect: 300 x 1" in aspect
    cut, _ = problems(out, capsys, "--list-bad", "--decode")
    assert "train-000000001: image: OSError" in cut
    found = verify.verify(str(out), list_bad=True, processes=1, max_pixels=4)
    assert [line.split(": ")[2] for line in found] == ["pixels"] * 3


def test_samples_under_a_wrong_key_are_found(shards, capsys):
    shard = shards / "jsonl-train-000000.tar"
    shard.write_bytes((shards / "jsonl-train-000001.tar").read_bytes())
    _rehash(shards, shard)
    (line,) = problems(shards, capsys)
    assert "4 bad samples" in line and "key: train-000000004" in line


def _rehash(out, shard):
    manifest = Manifest.load(out)
    manifest.splits["train"][0] = replace(
        manifest.splits["train"][0], sha256=sha256(shard), bytes=shard.stat().st_size
    )
    manifest.save(out)


def test_a_tar_that_nobody_lists_is_mentioned(shards, capsys):
    with tarfile.open(shards / "other.tar", "w"):
        pass
    capsys.readouterr()
    assert verify.main([str(shards), "--processes", "1"]) == 0
    assert "does not name other.tar" in capsys.readouterr().out


def test_show_prints_counts_fields_and_labels_and_draws_every_sample(shards, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    show.main([str(shards), "--out", str(sheet)])
    out = capsys.readouterr().out
    for text in ("train", "12", "questions[].question", "yes", "100.0%"):
        assert text in out
    with Image.open(sheet) as image:
        tile, margin, columns = show.LAYOUT.tile, show.LAYOUT.margin, show.LAYOUT.columns
        assert image.width == columns * (tile + margin) + margin
        height = (image.height - margin) // 2
        for i in range(12):  # the middle of every tile has its picture's colour
            x = margin + i % columns * (tile + margin) + tile // 2
            assert image.getpixel((x, margin + i // columns * height + tile // 2)) == (40 * (i % 6), 0, 0)


def test_show_draws_what_is_left_of_damaged_shards_and_text_without_images(shards, jsonl, tmp_path, capsys):
    (shards / "jsonl-train-000001.tar").unlink()
    show.main([str(shards), "--out", str(tmp_path / "new" / "a.png")])  # whose folder is made
    out = tmp_path / "text"
    path = jsonl({"caption": "only words [red]"}, {"label": "x"}, name="t.jsonl")
    prepare.main(["jsonl", "--out", str(out), "--train", str(path), "--processes", "1"])
    show.main([str(out), "--out", str(tmp_path / "b.png")])
    assert (tmp_path / "new" / "a.png").exists() and (tmp_path / "b.png").exists()


def test_bad_arguments_are_one_line(shards, tmp_path):
    for argv, says in (
        ([str(tmp_path / "none")], "manifest.json: not found"),
        ([str(shards), "--split", "dev"], "Known: train"),
        ([str(shards), "--out", str(shards / "manifest.json" / "x.png")], "cannot be written"),
        ([str(shards), "--out", str(tmp_path / "x.xyz")], "no ending of a picture format"),
        ([str(shards), "--samples", "0"], "--samples"),
    ):
        with pytest.raises(BadInput, match=says):
            show.main(argv)
    with pytest.raises(BadInput, match="not found"):
        verify.main([str(tmp_path / "none")])
    (shards / "manifest.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(BadInput, match="damaged"):
        verify.main([str(shards)])


def test_predictions_stand_on_the_sheet_green_where_right_and_red_where_wrong(shards, tmp_path):
    rows = [
        {"sample_id": "jsonl/train-000000000", "text": "q0?", "prediction": "yes", "answers": ["yes"], "type": ""},
        {"sample_id": "jsonl/train-000000000", "text": "q0?", "prediction": "no", "answers": ["yes"], "type": ""},
        {"sample_id": "jsonl/train-000000001", "text": "", "prediction": "a dog", "references": ["a cat"]},
        {"sample_id": "jsonl/train-000000001", "kind": "text_to_image", "text": "a", "prediction": "b", "rank": 1},
        {"sample_id": "jsonl/train-000000001", "kind": "image_to_text", "text": "", "prediction": "c", "rank": 4},
        {"sample_id": "other/train-000000001", "text": "", "prediction": "a cow", "references": ["a cat"]},
    ]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = show.rows_by_sample(file, "jsonl")
    assert show.predicted(read["train-000000000"]) == [("q0? yes", show.RIGHT), ("q0? no", show.WRONG)]
    assert show.predicted(read["train-000000001"]) == [
        ("a dog", show.GUESS),
        ("c (a text of its own: place 4)", show.WRONG),
    ]
    sheet = tmp_path / "sheet.png"
    show.main([str(shards), "--split", "train", "--out", str(sheet), "--samples", "2", "--predictions", str(file)])
    with Image.open(sheet) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0, 122, 51), (176, 0, 32)} <= colours


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"sample_id": "other/a", "prediction": "x"}', "holds nothing about 'jsonl'"),
        ('{"prediction": "x"}', "no predictions"),
        ("[1]", "no predictions"),
        ("not json", "no predictions"),
    ],
)
def test_predictions_of_something_else_are_refused(shards, tmp_path, text, words):
    file = tmp_path / "predictions.jsonl"
    file.write_text(text)
    more = ["--out", str(tmp_path / "sheet.png"), "--predictions", str(file)]
    with pytest.raises(BadInput, match=words):
        show.main([str(shards), "--split", "train", *more])
    with pytest.raises(BadInput, match="--split"):
        show.main([str(shards), *more])
