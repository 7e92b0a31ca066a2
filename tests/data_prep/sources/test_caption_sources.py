"""Flickr30k, Flickr8k, VizWiz captions and TextCaps from miniatures of their official layouts."""

import pytest

from tests.helpers.data.miniatures import prepared, put, put_picture, records


def captions(manifest, split):
    return {row["image_id"]: row["captions"] for row in records(manifest, split)}


@pytest.fixture
def flickr(tmp_path):
    root = tmp_path / "flickr"
    for number in (1000092795, 10002456, 2199200615):
        put_picture(root / f"flickr30k-images/{number}.jpg", number % 97)
    return root


def test_flickr30k_of_karpathy(flickr, tmp_path):
    splits = {"1000092795": "train", "10002456": "val", "2199200615": "test"}
    images = [
        {"filename": f"{name}.jpg", "imgid": i, "split": split, "sentences": [{"raw": f"{name} a", "sentid": i}]}
        for i, (name, split) in enumerate(splits.items())
    ]
    put(flickr / "dataset_flickr30k.json", {"images": images})
    manifest = prepared("flickr30k", flickr, tmp_path / "out")
    assert captions(manifest, "val") == {1: ["10002456 a"]} and list(manifest.splits) == ["train", "val", "test"]


def test_a_caption_that_is_none_is_set_aside_alone_and_an_unknown_split_once(flickr, tmp_path):
    texts = ["one", None, "three"]
    said = [{"raw": text, "sentid": k} for k, text in enumerate(texts)]
    images = [
        {"filename": "10002456.jpg", "imgid": 5, "split": "val", "sentences": said},
        {"filename": "1000092795.jpg", "imgid": 6, "split": "val", "sentences": []},
        {"filename": "2199200615.jpg", "imgid": 7, "split": "dev", "sentences": [{"raw": "x", "sentid": 9}]},
        {"filename": "1000092795.jpg", "imgid": 8, "split": "train", "sentences": [{"raw": "y", "sentid": 8}]},
        "no picture",
    ]
    put(flickr / "dataset_flickr30k.json", {"images": images})
    manifest = prepared("flickr30k", flickr, tmp_path / "out")
    assert captions(manifest, "val") == {5: ["one", "three"]} and "uncaptioned" not in manifest.account["train"]
    assert manifest.account["val"]["uncaptioned"] == [1, ["flickr30k-images/1000092795.jpg"]]
    assert manifest.account["val"]["aside"] == {"record of another form": [1, ["record 1"]]}
    unknown = "split that is none of train, restval, val, test"
    no_row = {"record of another form": [1, ["record 6"]]}
    assert manifest.account["train"]["aside"] == {unknown: [1, ["flickr30k-images/2199200615.jpg"]]} | no_row


def test_flickr30k_of_tokens_and_of_the_csv_with_its_broken_row(flickr, tmp_path):
    lines = ["10002456.jpg#0\tA man .", "10002456.jpg#1\tTwo men .", "nonsense", "10002456.jpg#2\t "]
    put(flickr / "results_20130124.token", "\n".join(lines))
    manifest = prepared("flickr30k", flickr, tmp_path / "tokens", "--form", "tokens")
    assert captions(manifest, "train") == {"10002456": ["A man .", "Two men ."]}
    aside = {"caption empty": [1, ["10002456.jpg#2"]], "line of another form": [1, ["nonsense"]]}
    assert manifest.account["train"]["aside"] == aside
    put(flickr / "results.csv", "| 0| a\n10002456.jpg| 1| \n10002456.jpg| 2| b\n")
    manifest = prepared("flickr30k", flickr, tmp_path / "odd", "--form", "csv")
    aside = {"caption empty": [1, ["10002456.jpg#1"]], "row of another form": [1, ["| 0| a"]]}
    assert captions(manifest, "train") == {"10002456": ["b"]} and manifest.account["train"]["aside"] == aside
    rows = [
        "image_name| comment_number| comment",
        "10002456.jpg| 0| A man , yes .",
        "2199200615.jpg| 4   A dog runs .",
    ]
    rows.append('10002456.jpg| 1| A "man" | a bar .')
    expected = {"10002456": ["A man , yes .", 'A "man" | a bar .'], "2199200615": ["A dog runs ."]}
    for name, ends, lines in (("csv", "\n", rows), ("crlf", "\r\n\r\n", rows), ("headless", "\n", rows[1:])):
        put(flickr / "results.csv", ends.join(lines))
        manifest = prepared("flickr30k", flickr, tmp_path / name, "--form", "csv")
        assert captions(manifest, "train") == expected and not manifest.account["train"]["aside"]


def test_flickr30k_of_blip_takes_the_last_part_of_a_name(flickr, tmp_path):
    put(flickr / "flickr30k_test.json", [{"image": "any/folder/10002456.jpg", "caption": ["a", "b"]}])
    manifest = prepared("flickr30k", flickr, tmp_path / "out", "--form", "blip")
    assert captions(manifest, "test") == {"10002456": ["a", "b"]}


def test_flickr8k_names_a_picture_that_is_not_there(tmp_path):
    root = tmp_path / "flickr8k"
    names = {"train": "a.jpg", "val": "b.jpg", "test": "c.jpg"}
    lines = [f"{name}#{k}\t{name} {k} .\n" for name in names.values() for k in range(2)]
    put(root / "Flickr8k.token.txt", "".join(lines) + "2258277193_586949ec62.jpg.1#0\tA ghost .\nnonsense\n")
    for list_name, split in (("trainImages", "train"), ("devImages", "val"), ("testImages", "test")):
        listed = names[split] + ("" if split != "val" else "\r\nb.jpg")
        put(root / f"Flickr_8k.{list_name}.txt", "d.jpg\r\n\r\n" + listed)  # no line end at the end
    for number, name in enumerate(names.values()):
        put_picture(root / "Flicker8k_Dataset" / name, number)
    manifest = prepared("flickr8k", root, tmp_path / "out")
    assert captions(manifest, "val") == {"b": ["b.jpg 0 .", "b.jpg 1 ."]}
    ghost = {"line of another form": [1, ["nonsense"]], "picture in no list": [1, ["2258277193_586949ec62.jpg.1#0"]]}
    accounts = {split: manifest.account[split] for split in manifest.splits}
    assert {s: a["aside"] for s, a in accounts.items()} == {
        "train": ghost,
        "val": {"listed before": [1, ["b.jpg"]]},
        "test": {},
    }
    assert all(account["uncaptioned"] == [1, ["d.jpg"]] for account in accounts.values())
    assert accounts["train"]["records"] == 4, "each row that leads to no sample is told once"
    manifest = prepared("flickr8k", root, tmp_path / "test", "--splits", "test")
    assert manifest.account["test"]["aside"] == ghost, "whichever split is read first"


@pytest.fixture
def vizwiz(tmp_path):
    root = tmp_path / "vizwiz"
    images = [{"id": 23431 + n, "file_name": f"VizWiz_val_{n:08d}.jpg"} for n in range(2)]
    flags = [(False, False), (True, False), (False, True), (False, True)]
    rows = [
        {"id": k, "image_id": 23431 + k // 3, "caption": f"c{k}", "is_precanned": pre, "is_rejected": rejected}
        for k, (pre, rejected) in enumerate(flags)
    ]
    put(root / "annotations/val.json", {"images": images, "annotations": rows})
    put(root / "annotations/test.json", {"images": [{"id": 31181, "file_name": "VizWiz_test_00000000.jpg"}]})
    for n in range(2):
        put_picture(root / f"val/VizWiz_val_{n:08d}.jpg", n)
    put_picture(root / "test/VizWiz_test_00000000.jpg", 9)
    return root


def test_vizwiz_captions_without_the_rejected_and_the_precanned_or_all(vizwiz, tmp_path):
    manifest = prepared("vizwiz-captions", vizwiz, tmp_path / "out")
    assert captions(manifest, "val") == {23431: ["c0"]}
    aside = {"caption precanned": [1, ["1"]], "caption rejected": [2, ["2", "3"]]}
    assert manifest.account["val"]["aside"] == aside
    assert captions(manifest, "test") == {31181: []}  # which evaluation describes and does not score
    every = prepared("vizwiz-captions", vizwiz, tmp_path / "all", "--captions", "all")
    assert captions(every, "val") == {23431: ["c0", "c1", "c2"], 23432: ["c3"]}
    texts = {m.account["val"]["expected"]["texts"] for m in (manifest, every)}
    assert texts == {33_145, 38_750}


def test_a_picture_listed_without_its_id_or_name_is_set_aside_with_its_captions(vizwiz, tmp_path):
    images = [{"file_name": "x.jpg"}, {"id": 5}, "a text", {"id": 23431, "file_name": "VizWiz_val_00000000.jpg"}]
    rows = [{"id": k, "image_id": k, "caption": f"c{k}"} for k in (5, 23431)]
    put(vizwiz / "annotations/val.json", {"images": images, "annotations": rows})
    manifest = prepared("vizwiz-captions", vizwiz, tmp_path / "out", "--captions", "all", "--splits", "val")
    assert captions(manifest, "val") == {23431: ["c23431"]}
    assert manifest.account["val"]["aside"] == {
        "no 'id' in the record": [1, ["image 0"]],
        "no 'file_name' in the record": [1, ["image 1"]],
        "record of another form": [1, ["image 2"]],
        "picture not listed under `images`": [1, ["5"]],
    }


def test_textcaps_takes_pictures_of_train_and_val_from_one_folder(tmp_path):
    root = tmp_path / "textcaps"
    row = {"image_id": "09b6cefc7b1f8a3d", "caption_id": 1, "caption_str": "a sign", "reference_strs": ["a", "b"]}
    put(root / "TextCaps_0.1_val.json", {"dataset_type": "val", "data": [row, row | {"caption_id": 2}]})
    put(root / "TextCaps_0.1_test.json", {"data": [{"image_id": "00ff00ff00ff00ff"}]})
    put_picture(root / "train_images/09b6cefc7b1f8a3d.jpg", 1)
    put_picture(root / "test_images/00ff00ff00ff00ff.jpg", 2)
    manifest = prepared("textcaps", root, tmp_path / "out")
    assert captions(manifest, "val") == {"09b6cefc7b1f8a3d": ["a sign", "a sign"]}
    assert records(manifest, "test")[0]["image_id"] == "00ff00ff00ff00ff"
