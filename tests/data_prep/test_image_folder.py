"""Folders of images: which of them are splits, which are classes, and what is refused because it could be either."""

import pytest

from data_prep import prepare
from data_prep.sources.image_folder import split_of
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput
from tests.helpers.data.images import picture


def folder(tmp_path, *classes):
    """Three pictures in each of the named folders below `tmp_path`/photos."""
    for name in classes:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(picture((40 * i, 0, 0)))
    return tmp_path / "photos"


def prepared(tmp_path, *argv):
    out = tmp_path / "out"
    prepare.main(["image-folder", "--folder", str(tmp_path / "photos"), "--out", str(out), "--processes", "1", *argv])
    return Manifest.load(out)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "val", "test"), ("train", "val", "test")),
        (("training", "validation"), ("train", "val")),
        (("TRAIN", "VAL"), ("train", "val")),
        (("Train", "Valid", "Testing"), ("train", "val", "test")),
        (("train", "dev"), ("train", "val")),
        (("train", "development"), ("train", "val")),
        (("trn", "eval", "tst"), ("train", "val", "test")),
        (("train2017", "val2017"), ("train", "val")),
        (("train_images", "test-set"), ("train", "test")),
        (("trainset", "TestSet"), ("train", "test")),
        (("val", "test"), ("val", "test")),
        (("Validation",), ("val",)),
    ],
)
def test_folders_named_like_splits_are_the_splits(names, splits, tmp_path):
    folder(tmp_path, *(f"{split}/{name}" for split in names for name in ("cat", "dog")))
    manifest = prepared(tmp_path)
    assert manifest.labels == ["cat", "dog"] and tuple(manifest.splits) == splits
    assert {manifest.samples(split) for split in manifest.splits} == {6}


@pytest.mark.parametrize(
    "name",
    [
        *("cat", "trainer", "validity", "protest", "test_bench", "train_station", "devil", "2017", "crash test"),
        "traindata",
    ],
)
def test_other_names_are_classes(name, tmp_path):
    assert split_of(name) is None
    folder(tmp_path, name, "dog")
    assert prepared(tmp_path).labels == sorted([name, "dog"])


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (("cat", "dog", "test"), "'test' is named like a split, 'cat' beside it is not"),
        (("bus", "car", "train"), "'train' is named like a split, 'bus'"),
        (("val/cat", "dev/cat"), "'dev' and 'val' both mean val"),
        (("photos/train/cat", "photos/val/cat"), "train, val are folders below the class folders"),
        (("cat/Train", "cat/Test", "dog/Train"), "Test, Train are folders below the class folders"),
        (("train/training/cat", "train/validation/cat"), "training, validation are classes"),
        (("seg_train/cat", "seg_test/cat"), "seg_test, seg_train are classes"),
        (("all/val_clean/cat", "all/train_clean/cat"), "train_clean, val_clean are folders below"),
        (("cat/train", "cat/val", "dog/train", "dog/extra"), "train, val are folders below"),
        (("cat/2017/train", "dog/2017/val"), "train, val are folders below"),
        (("seg_train/cat", "seg_test/cat", "seg_pred/cat"), "seg_test, seg_train are classes"),
        (("traindata/cat", "testdata/cat"), "testdata, traindata are classes"),
        (("xtrain/cat", "xval/cat", "notes/cat"), "xtrain, xval are classes"),
        (("train/cat", "test/dog"), "class 'dog' has no images in train"),
    ],
)
def test_what_could_be_splits_or_classes_is_refused(classes, says, tmp_path):
    folder(tmp_path, *classes)
    with pytest.raises(BadInput, match=says):
        prepared(tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_user_may_say_that_all_are_classes(tmp_path):
    folder(tmp_path, "bus", "train", "test")
    manifest = prepared(tmp_path, "--as-classes")
    assert manifest.labels == ["bus", "test", "train"] and manifest.samples("train") == 9


def test_splits_of_their_own_and_a_share_are_refused_together(tmp_path):
    folder(tmp_path, "TRAIN/cat")
    with pytest.raises(BadInput, match=r"own splits \(TRAIN\)"):
        prepared(tmp_path, "--val-fraction", "0.1")


def test_folders_below_class_folders_and_empty_ones_are_told(tmp_path, capsys):
    photos = folder(tmp_path, "cat", "cat/tabby", "dog")
    (photos / "mouse").mkdir()
    manifest = prepared(tmp_path)
    assert manifest.labels == ["cat", "dog"] and manifest.samples("train") == 9
    below, empty = capsys.readouterr().err.splitlines()[:2]
    assert "3 images lie in folders below their class folder" in below and "tabby" in below
    assert "1 folders hold no image" in empty and "mouse" in empty


def test_a_name_that_is_not_utf_8_is_refused_in_one_line_before_anything_is_written(tmp_path):
    photos = folder(tmp_path, "cat", "dog")
    (photos / "dog" / "0.png").rename(photos / "dog" / "\udcff.png")
    with pytest.raises(BadInput, match=r"dog/\\udcff\.png: this name is not UTF-8"):
        prepared(tmp_path)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_files_that_are_no_pictures_of_a_class_are_in_the_report(tmp_path, capsys):
    root = folder(tmp_path, "train/cat", "val/cat")
    (root / "train/cat/notes.txt").write_text("x")
    (root / "train/loose.png").write_bytes(picture((1, 2, 3)))
    (root / "train/cat/.hidden.png").write_bytes(b"")
    (root / "val/cat/odd\udcff.csv").write_text("x")
    manifest = prepared(tmp_path)
    reason = "no picture in a class folder"
    train, val = manifest.account["train"], manifest.account["val"]
    assert train["aside"] == {reason: [2, ["train/cat/notes.txt", "train/loose.png"]]} and train["records"] == 5
    assert val["aside"] == {reason: [1, ["val/cat/odd\\udcff.csv"]]} and val["records"] == 4
    assert f"train: 2 set aside, {reason}: train/cat/notes.txt" in capsys.readouterr().out


def test_those_of_a_folder_without_splits_are_told_once_with_the_training_split(tmp_path):
    root = folder(tmp_path, "cat", "dog")
    (root / "readme.txt").write_text("x")
    manifest = prepared(tmp_path, "--val-fraction", "0.34")
    assert manifest.account["train"]["aside"] == {"no picture in a class folder": [1, ["readme.txt"]]}
    assert manifest.account["train"]["records"] == 5 and "aside" not in manifest.account.get("val", {})
