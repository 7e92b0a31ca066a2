"""The report of a preparation: pictures that several splits have, and files that are missing, for every source."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import prepare, sources, verify
from data_prep.common import duplicates, report
from data_prep.sources.common.layout import LayoutSource
from mmpeft_ds import registry
from mmpeft_ds.data import identity
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput
from tests.helpers.data.miniatures import prepared, put, put_picture

LAYOUTS = [n for n in registry.names(sources) if issubclass(registry.load(sources, n, "test"), LayoutSource)]


@pytest.fixture
def lines(jsonl, tmp_path):
    """Train shows 0, 1, 1, 2 and 3 (two a line); val 1; test 3 and 5."""
    jsonl({"image": "0.png", "caption": "a"}, {"image": "1.png", "caption": "b"}, {"image": "1.png", "caption": "c"})
    train = [{"image": i, "caption": f"t {i}"} for i in ("0.png", "1.png", "1.png")]
    train.append({"image": ["2.png", "3.png"], "caption": "two"})
    files = {
        "train": jsonl(*train),
        "val": jsonl({"image": "1.png", "caption": "v"}, name="val.jsonl"),
        "test": jsonl({"image": "3.png", "caption": "x"}, {"image": "5.png", "caption": "y"}, name="test.jsonl"),
    }
    options = [word for split, path in files.items() for word in (f"--{split}", str(path))]
    return ["jsonl", "--out", str(tmp_path / "out"), "--samples-per-shard", "1", "--processes", "1", *options]


def test_ten_samples_are_named_however_many_pictures_each_holds(jsonl, tmp_path):
    for number in range(24):
        put_picture(tmp_path / f"{number}.png", number, "PNG")
    pairs = [{"image": [f"{n}.png", f"{n + 12}.png"], "caption": f"t {n}"} for n in range(12)]
    both = [{"image": f"{n}.png", "caption": f"v {n}"} for n in range(24)]
    files = [
        word
        for split, rows in (("train", pairs), ("val", both))
        for word in (f"--{split}", jsonl(*rows, name=f"{split}.jsonl"))
    ]
    prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--processes", "1", *map(str, files)])
    also_in = Manifest.load(tmp_path / "out").account["train"]["also_in"]
    assert also_in == {"val": [24, [f"train.jsonl:{n}" for n in range(1, 11)]]}


def test_training_pictures_of_other_splits_are_counted_and_named(lines, tmp_path, capsys):
    prepare.main(lines)
    account = Manifest.load(tmp_path / "out").account
    assert account == {"train": {"also_in": {"val": [1, ["train.jsonl:2"]], "test": [1, ["train.jsonl:4"]]}}}
    assert "train: 1 of the pictures are also in test: train.jsonl:4\n" in capsys.readouterr().out
    prepare.main(lines)
    again = capsys.readouterr().out
    assert "already prepared" in again and "train: 1 of the pictures are also in test: train.jsonl:4\n" in again


def bad(folder, broken=3):
    """Pictures that training cannot use: a strip, more pixels than the limit by the header alone, and no pictures."""
    (folder / "strip.png").write_bytes(encoded_of(900, 3))
    (folder / "strip.jpg").write_bytes(encoded_of(3, 900, "JPEG"))
    head = bytearray(encoded_of(8, 8))
    head[16:24] = (20_000).to_bytes(4, "big") * 2
    (folder / "large.png").write_bytes(head[:29] + zlib.crc32(head[12:29]).to_bytes(4, "big") + head[33:])
    for number in range(broken):
        (folder / f"broken{number}.jpg").write_bytes(b"<html>not found</html>")
    return ["strip.png", "strip.jpg", "large.png", *(f"broken{n}.jpg" for n in range(broken))]


def encoded_of(width, height, form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, form)
    return buffer.getvalue()


BAD = {
    "not a picture": 13,
    "more than 89,478,485 pixels (data.max_pixels)": 1,
    "more than 200 times as long as wide": 2,
}


@pytest.mark.parametrize("more", [[], ["--resize", "2"]], ids=["as they are", "resized"])
def test_pictures_that_training_cannot_use_are_counted_by_reason_and_named(jsonl, tmp_path, capsys, more):
    names = bad(tmp_path, broken=12)
    rows = [{"image": name, "caption": "a", "id": name} for name in ("0.png", *names, "1.png")]
    rows.append({"image": ["2.png", "broken0.jpg"], "caption": "two", "id": "pair"})
    words = ["jsonl", "--out", str(tmp_path / "out"), "--samples-per-shard", "4", "--processes", "1", *more]
    words += ["--train", str(jsonl(*rows)), "--val", str(jsonl(rows[0], name="val.jsonl"))]
    prepare.main(words)
    manifest = Manifest.load(tmp_path / "out")
    counted = manifest.account["train"]["bad"]
    assert {reason: number for reason, (number, _) in counted.items()} == BAD
    assert counted["more than 200 times as long as wide"][1] == ["strip.png", "strip.jpg"]
    assert counted["not a picture"][1] == names[3:13] and "bad" not in manifest.account.get("val", {})
    assert len(verify.verify(str(tmp_path / "out"), list_bad=True, processes=1)) == sum(BAD.values())
    for _ in range(2):  # the same command prints it again
        said = capsys.readouterr().out
        assert "train: 2 samples that training will leave out, more than 200 times as long as wide: strip.png" in said
        assert "train: 13 samples that training will leave out, not a picture: broken0.jpg, broken1.jpg" in said
        assert "broken9.jpg, ...\n" in said and "train: 1 sample that training will leave out, more than 89" in said
        prepare.main(words)


def test_every_source_of_own_pictures_tells_of_those_that_training_cannot_use(image_folder, tmp_path, capsys):
    bad(image_folder / "dog")
    words = ["image-folder", "--folder", str(image_folder), "--out", str(tmp_path / "out"), "--processes", "1"]
    prepare.main(words)
    assert "train: 3 samples that training will leave out, not a picture: dog/broken0.jpg" in capsys.readouterr().out


def test_in_several_passes_the_same_is_found(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "BLOCK", 1)
    prepare.main(lines)
    also_in = Manifest.load(tmp_path / "out").account["train"]["also_in"]
    assert also_in == {"val": [1, ["train.jsonl:2"]], "test": [1, ["train.jsonl:4"]]}


def test_pictures_of_val_that_are_also_in_test_are_told_too(jsonl, lines, tmp_path):
    jsonl({"image": "5.png", "caption": "v"}, name="val.jsonl")
    prepare.main(lines)
    assert Manifest.load(tmp_path / "out").account["val"] == {"also_in": {"test": [1, ["val.jsonl:1"]]}}


def test_splits_without_a_common_picture_have_no_such_line(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    prepare.main(["image-folder", "--folder", str(image_folder), "--out", str(out), "--val-fraction", "0.25"])
    assert not Manifest.load(out).account and "also in" not in capsys.readouterr().out


def test_ten_names_are_shown_of_a_copied_folder(image_folder, tmp_path, capsys):
    splits = tmp_path / "set"
    splits.mkdir()
    image_folder.rename(splits / "train")
    for path in (p for p in (splits / "train").rglob("*") if p.is_file()):
        put(splits / "test" / path.relative_to(splits / "train"), path.read_bytes())
    prepare.main(["image-folder", "--folder", str(splits), "--out", str(tmp_path / "out"), "--processes", "1"])
    number, names = Manifest.load(tmp_path / "out").account["train"]["also_in"]["test"]
    assert number == 24 and names == [f"train/Cat.v1/a.b.{i:02d}.{'JPG' if i % 2 else 'png'}" for i in range(10)]
    assert ", ...\n" in capsys.readouterr().out


def test_shared_captions_and_equal_pictures_are_counted_as_one_by_one(monkeypatch):
    """Against plain loops, in one pass and in many."""
    random = np.random.default_rng(0)
    blocks = []
    for _ in range(5):
        counts = random.integers(0, 4, 20).astype(np.uint32)
        block = {"samples": random.integers(0, 30, 20).astype(np.uint64), "caption_counts": counts}
        blocks.append(block | {"captions": random.integers(100, 140, counts.sum()).astype(np.uint64)})
    pictures, owners = [], {}
    for number, block in enumerate(blocks):
        captions = iter(block["captions"].tolist())
        for place, (picture, count) in enumerate(zip(block["samples"], block["caption_counts"], strict=True)):
            pictures += [int(picture)] if picture else []
            for _ in range(count):
                owners.setdefault(next(captions), []).append(int(picture) or f"sample {number} {place}")
    shared = sum(len(of) for of in owners.values() if len(set(of)) > 1)
    for at_a_time in (1 << 20, 7):
        monkeypatch.setattr(identity, "BLOCK", at_a_time)
        found = identity.summary(lambda: iter(blocks))
        assert found["images"] == {"distinct": len(set(pictures)), "of": len(pictures)}
        assert found["captions[]"] == {"shared": shared} and shared


def test_frames_are_no_pictures_of_their_own():
    contents = identity.Contents()
    from mmpeft_ds.data.writer import RawSample

    contents.add(RawSample("v", [("jpg", b"black"), ("jpg", b"a")], {"frame_times": [0.0, 1.0]}))
    contents.add(RawSample("p", [("jpg", b"black"), ("jpg", b"a")], {}))
    arrays = contents.arrays()
    assert arrays["picture_counts"].tolist() == [1, 2] and arrays["samples"][0] == arrays["samples"][1]
    assert duplicates.SHOWN == 10


def test_pictures_listed_without_a_caption_are_counted_and_named(tmp_path, capsys):
    for number in range(3):
        put_picture(tmp_path / f"coco/train2014/{number}.jpg", number)
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)]
    rows = [{"id": 1, "image_id": 1, "caption": "b"}, {"id": 2, "image_id": 1, "caption": "c"}]
    put(tmp_path / "coco/annotations/captions_train2014.json", {"images": images, "annotations": rows})
    manifest = prepared("coco-captions", tmp_path / "coco", tmp_path / "out", "--form", "official")
    assert manifest.account["train"]["uncaptioned"] == [2, ["train2014/0.jpg", "train2014/2.jpg"]]
    line = "train: 2 left out, pictures or videos that are listed without any text"
    assert f"{line}: train2014/0.jpg, train2014/2.jpg\n" in capsys.readouterr().out
    manifest.account["train"]["uncaptioned"] = 2  # of an earlier version
    report.show(manifest)
    assert f"{line}\n" in capsys.readouterr().out


def test_archives_that_are_still_packed_are_named(tmp_path):
    put(tmp_path / "root/Annotations.zip", b"PK")
    with pytest.raises(BadInput, match=r"test.json not there. Unpack Annotations.zip there. VizWiz-VQA comes from"):
        prepared("vizwiz-vqa", tmp_path / "root", tmp_path / "out")


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_folder_is_one_line_with_what_is_missing_whence_it_comes_and_the_layout(name, tmp_path):
    (tmp_path / "root").mkdir()
    options = ["--dataset", "oxford_pets"] if name == "coop_split" else []
    with pytest.raises(BadInput) as error:
        prepared(name.replace("_", "-"), tmp_path / "root", tmp_path / "out", *options)
    said = str(error.value)
    assert "\n" not in said and "comes from" in said and "expected below --root: " in said
    assert "not there" in said
    assert not (tmp_path / "out").exists()
