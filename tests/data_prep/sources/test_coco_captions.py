"""COCO captions from the official layout, Karpathy's file and BLIP's lists."""

import pytest

from data_prep.sources.coco_captions import CocoCaptions
from mmpeft_ds.errors import BadInput
from tests.helpers.data.miniatures import prepared, put, put_picture, records

SPLITS = ("train", "train", "restval", "val", "test", "test")


def name(number):
    """restval, val and test pictures lie in val2014."""
    folder = "train2014" if SPLITS[number] == "train" else "val2014"
    return f"{folder}/COCO_{folder}_{number:012d}.jpg"


@pytest.fixture
def root(tmp_path):
    for number in range(len(SPLITS)):
        put_picture(tmp_path / "coco" / name(number), number)
    return tmp_path / "coco"


@pytest.fixture
def karpathy(root):
    images = []
    for number, split in enumerate(SPLITS):
        folder, file = name(number).split("/")
        sentences = [{"raw": f"caption {number}-{k} ", "sentid": 10 * number + k} for k in range(5)]
        images.append({"filepath": folder, "filename": file, "imgid": number, "cocoid": 900 + number, "split": split})
        images[-1]["sentences"] = sentences
    put(root / "dataset_coco.json", {"dataset": "coco", "images": images})
    return root


def test_restval_trains_and_captions_stay_as_they_were_written(karpathy, tmp_path):
    manifest = prepared("coco-captions", karpathy, tmp_path / "out")
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 3, "val": 1, "test": 2}
    rows = records(manifest, "train")
    assert [row["image_id"] for row in rows] == [900, 901, 902]
    assert rows[2]["source_name"] == name(2)
    assert rows[2]["captions"] == [f"caption 2-{k} " for k in range(5)] and rows[2]["caption_ids"] == [*range(20, 25)]


def test_pictures_are_stored_by_what_they_hold_and_broken_ones_set_aside(karpathy, tmp_path, capsys):
    put_picture(karpathy / name(0), 0, "PNG")
    (karpathy / name(1)).unlink()
    whole = (karpathy / name(2)).read_bytes()
    (karpathy / name(2)).write_bytes(whole[: len(whole) // 2])
    (karpathy / name(4)).write_bytes(b"<html>not found</html>")
    manifest = prepared("coco-captions", karpathy, tmp_path / "out")
    assert [row["endings"] for row in records(manifest, "train")] == [["png"]]
    aside = {split: manifest.account[split]["aside"] for split in manifest.splits}
    assert aside["train"] == {"picture missing": [5, [name(1)]], "picture cut off": [5, [name(2)]]}
    assert aside["test"] == {"not a picture": [5, [name(4)]]} and not aside["val"]
    printed = capsys.readouterr().out
    assert f"train: 5 set aside, picture missing: {name(1)}" in printed and "of 113,287" in printed


def test_official_files_are_joined_by_id_in_any_order(root, tmp_path):
    images = [{"id": 7 - number, "file_name": name(number).split("/")[1]} for number in range(2)] + [{"id": 55}]
    rows = [{"id": k, "image_id": [7, 6, 55][k % 3], "caption": f"c{k}"} for k in range(9)] + [
        {"id": 0, "image_id": 7}
    ]
    rows += [{"id": 3, "image_id": 7, "caption": "again"}, {"id": 99, "image_id": 6, "caption": None}]
    rows += [{"id": 98, "image_id": 6, "caption": "\n"}]
    put(root / "annotations/captions_train2014.json", {"images": images, "annotations": rows})
    manifest = prepared("coco-captions", root, tmp_path / "out", "--form", "official")
    assert list(manifest.splits) == ["train"]  # there is no file of val
    assert [row["captions"] for row in records(manifest, "train")] == [["c0", "c3", "c6"], ["c1", "c4", "c7"]]
    account = manifest.account["train"]
    assert account["records"] == 14 and account["aside"] == {
        "caption empty": [1, ["98"]],
        "id given before": [1, ["3"]],
        "no 'file_name' in the record": [1, ["image 2"]],
        "no 'caption' in the record": [1, ["record 9"]],
        "picture not listed under `images`": [3, ["55"]],
        "record of another form": [1, ["record 11"]],
    }


def test_lists_of_blip_hold_a_caption_or_a_list_a_row(root, tmp_path):
    train = [{"image": name(k // 2), "caption": f"t{k}", "image_id": f"coco_{k}"} for k in range(4)]
    put(root / "coco_karpathy_train.json", train)
    put(root / "coco_karpathy_val.json", [{"image": name(3), "caption": ["a", "b"]}])
    manifest = prepared("coco-captions", root, tmp_path / "out", "--form", "blip")
    assert [row["captions"] for row in records(manifest, "train")] == [["t0", "t1"], ["t2", "t3"]]
    assert records(manifest, "val")[0]["image_id"] == 3


def test_a_limit_keeps_the_first_samples_and_looks_for_no_other_picture(karpathy, tmp_path):
    (karpathy / name(2)).unlink()
    manifest = prepared("coco-captions", karpathy, tmp_path / "out", "--limit", "2", "--splits", "train")
    assert len(records(manifest, "train")) == 2 and not manifest.account["train"]["aside"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--form", "official"], "captions_train2014.json.*not there. COCO captions comes from"),
        (["--splits", "dev"], "no such split here. Known: train, val, test"),
        (["--limit", "-1"], "--limit: -1"),
        (["--pictures", "nowhere"], "--pictures nowhere: no such directory"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(karpathy, tmp_path, options, wanted):
    with pytest.raises(BadInput, match=wanted):
        prepared("coco-captions", karpathy, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_names_that_are_shown_are_the_first_ones_of_the_file(root, tmp_path):
    rows = [{"image": f"val2014/COCO_{number}.jpg", "caption": "a"} for number in range(12, 0, -1)]
    put(root / "annotations/coco_karpathy_val.json", [*rows, {"image": name(3), "caption": "b"}])
    manifest = prepared("coco-captions", root, tmp_path / "out", "--form", "blip", "--splits", "val", "val")
    number, names = manifest.account["val"]["aside"]["picture missing"]
    assert number == 12 and names == [row["image"] for row in rows[:10]] and len(records(manifest, "val")) == 1


def test_a_split_whose_samples_are_all_set_aside_is_told(karpathy, tmp_path, capsys):
    (karpathy / name(3)).unlink()
    manifest = prepared("coco-captions", karpathy, tmp_path / "out")
    assert list(manifest.splits) == ["train", "test"]
    assert manifest.account["val"]["aside"] == {"picture missing": [5, [name(3)]]}
    printed = capsys.readouterr().out
    assert f"val: 5 set aside, picture missing: {name(3)}\n" in printed
    prepared("coco-captions", karpathy, tmp_path / "out")
    assert printed.split("\n", 1)[1] == capsys.readouterr().out.split("\n", 1)[1], "told again by the same command"


def test_a_picture_that_went_away_since_the_preparation_began_is_one_line(karpathy, tmp_path, monkeypatch):
    fill = CocoCaptions._fill

    def then_lost(self, index):
        fill(self, index)
        (karpathy / name(4)).unlink()

    monkeypatch.setattr(CocoCaptions, "_fill", then_lost)
    with pytest.raises(BadInput, match=f"{name(4)}: cannot be read any more .No such file or directory.*--overwrite"):
        prepared("coco-captions", karpathy, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(BadInput, match="any more"):  # the index stays
        prepared("coco-captions", karpathy, tmp_path / "out")
    manifest = prepared("coco-captions", karpathy, tmp_path / "out", "--overwrite")
    assert manifest.samples("test") == 1 and manifest.account["test"]["aside"] == {"picture missing": [5, [name(4)]]}


def test_a_path_that_leaves_the_folder_is_not_read(root, tmp_path):
    put_picture(tmp_path / "secret_1.jpg", 1)
    put(
        root / "coco_karpathy_val.json",
        [{"image": "../secret_1.jpg", "caption": "a"}, {"image": name(3), "caption": "b"}],
    )
    manifest = prepared("coco-captions", root, tmp_path / "out", "--form", "blip", "--splits", "val")
    assert [row["captions"] for row in records(manifest, "val")] == [["b"]]
    assert manifest.account["val"]["aside"] == {"path leaves the folder": [1, ["../secret_1.jpg"]]}
