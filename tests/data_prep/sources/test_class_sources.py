"""CoOp's data sets by name, and ImageNet with its test sets, from miniatures of their layouts."""

import pytest

from data_prep.sources import coop_split
from mmpeft_ds.errors import BadInput
from tests.helpers.data.miniatures import prepared, put, put_picture, records

WITH_FILE = [name for name, known in coop_split.DATASETS.items() if known.file]


def classes(manifest, split):
    return [(row["source_name"], row["label"], row["class_name"]) for row in records(manifest, split)]


@pytest.mark.parametrize("dataset", WITH_FILE)
def test_a_data_set_of_coops_is_known_by_name(dataset, tmp_path):
    known = coop_split.DATASETS[dataset]
    items = [["b/x y.jpg", 1, "zoo"], ["a/1.jpg", 0, "abbey"]]
    put(tmp_path / "data" / known.folder / f"split_zhou_{known.file}.json", {"train": items, "test": items[:1]})
    for number, (path, _, _) in enumerate(items):
        put_picture(tmp_path / "data" / known.folder / known.pictures / path, number)
    manifest = prepared("coop-split", tmp_path / "data", tmp_path / "out", "--dataset", dataset)
    assert manifest.labels == ["abbey", "zoo"] and classes(manifest, "train") == [tuple(item) for item in items]
    assert manifest.account["train"]["template"].count("{}") == 1
    assert manifest.account["test"]["expected"]["samples"] == known.counts[2]


def test_pictures_that_are_not_there_are_set_aside_and_the_order_stays(tmp_path):
    root = tmp_path / "pets"
    items = [[f"{i}.jpg", str(i % 2), "cat" if i % 2 else "dog"] for i in (3, 1, 2, 1)]  # labels as text too
    put(root / "split.json", {"train": items})
    for i in (3, 1):
        put_picture(root / f"{i}.jpg", i)
    manifest = prepared("coop-split", root, tmp_path / "out", "--splits-file", str(root / "split.json"))
    assert [name for name, _, _ in classes(manifest, "train")] == ["3.jpg", "1.jpg"]
    assert manifest.account["train"]["aside"] == {
        "id given before": [1, ["1.jpg"]],
        "picture missing": [1, ["2.jpg"]],
    }


def test_aircraft_comes_with_lists_of_variants_that_hold_blanks_and_slashes(tmp_path):
    root = tmp_path / "fgvc_aircraft"
    put(root / "variants.txt", "707-320\nF/A-18\nDornier 328\n")
    put(root / "images_variant_train.txt", "0034309 F/A-18\n0034310 Dornier 328\n0034311 Concorde\n")
    for number in (34309, 34310):
        put_picture(root / f"data/images/{number:07d}.jpg", number % 50)  # as the archive has it
    manifest = prepared("coop-split", tmp_path, tmp_path / "out", "--dataset", "fgvc_aircraft")
    assert classes(manifest, "train") == [("0034309.jpg", 1, "F/A-18"), ("0034310.jpg", 2, "Dornier 328")]
    aside = manifest.account["train"]["aside"]
    assert aside == {"variant that variants.txt does not name": [1, ["0034311 Concorde"]]}
    put(root / "variants.txt", "707-320\nF/A-18\nF/A-18\n")
    with pytest.raises(BadInput, match="variants.txt: 'F/A-18' stands twice, and labels go by its lines"):
        prepared("coop-split", tmp_path, tmp_path / "twice", "--dataset", "fgvc_aircraft")


def test_a_row_whose_path_is_none_of_a_picture_is_set_aside_alone(tmp_path):
    root = tmp_path / "pets"
    put_picture(root / "b_1", 1)  # a picture by its content
    put(root / "a.mat", b"MATLAB 5.0 MAT-file")
    put(root / "split.json", {"train": [["../b_1", 0, "cat"], ["a.mat", 0, "cat"], ["b_1", 0, "cat"]]})
    manifest = prepared("coop-split", root, tmp_path / "out", "--splits-file", str(root / "split.json"))
    assert classes(manifest, "train") == [("b_1", 0, "cat")]
    aside = {"not a picture": [1, ["a.mat"]], "path leaves the folder": [1, ["../b_1"]]}
    assert manifest.account["train"]["aside"] == aside


@pytest.mark.parametrize("row", [["b_1", "1e999", "cat"], ["b_1", float("inf"), "cat"], ["b_1", 0, None], ["b_1", 0]])
def test_a_split_file_of_another_form_is_refused(row, tmp_path):
    put(tmp_path / "split.json", {"train": [row]})
    with pytest.raises(BadInput, match=r"split.json: no split file of CoOp \("):
        prepared("coop-split", tmp_path, tmp_path / "out", "--splits-file", str(tmp_path / "split.json"))


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "imagenet"
    put(root / "classnames.txt", "n04008634 missile\nn01440764 tench\nn03773504 missile\n")
    for number, folder in enumerate(("n01440764", "n03773504", "n04008634")):
        put_picture(root / "images/train" / folder / f"{folder}_1.JPEG", number)
        put_picture(root / "images/val" / folder / f"v {number}.JPEG", 5 + number, "PNG")
    return root


def test_imagenets_labels_are_folders_in_order_and_equal_names_are_told_apart(imagenet, tmp_path):
    manifest = prepared("imagenet", imagenet, tmp_path / "out")
    assert manifest.labels == ["tench", "missile (n03773504)", "missile (n04008634)"]
    assert [label for _, label, _ in classes(manifest, "train")] == [0, 1, 2]
    assert records(manifest, "val")[0]["endings"] == ["png"]
    by_name = prepared("coop-split", imagenet.parent, tmp_path / "coop", "--dataset", "imagenet")
    assert by_name.labels == manifest.labels
    assert [c[1:] for c in classes(by_name, "test")] == [c[1:] for c in classes(manifest, "val")]


def test_folders_of_no_class_and_classes_without_folder_are_told(imagenet, tmp_path, capsys):
    put_picture(imagenet / "images/train/n99999999/a.JPEG", 9)
    (imagenet / "images/train/n01440764").rename(imagenet / "images/train/tench")
    manifest = prepared("imagenet", imagenet, tmp_path / "out")
    aside = manifest.account["train"]["aside"]
    assert list(aside) == ["folder of no class"] and aside["folder of no class"][0] == 2
    strange, lost = aside["folder of no class"][1]
    assert strange == "images/train/n99999999/a.JPEG" and lost.startswith("images/train/tench/")
    assert "train: 1 of 3 classes have no folder: n01440764" in capsys.readouterr().err


def test_imagenets_pictures_may_lie_elsewhere(imagenet, tmp_path):
    (tmp_path / "disk").mkdir()
    (imagenet / "images").rename(tmp_path / "disk/images")
    manifest = prepared("imagenet", imagenet, tmp_path / "out", "--pictures", str(tmp_path / "disk"))
    assert [label for _, label, _ in classes(manifest, "train")] == [0, 1, 2]
    options = ["--dataset", "imagenet", "--pictures", str(tmp_path / "disk")]
    by_name = prepared("coop-split", imagenet.parent, tmp_path / "coop", *options)
    assert classes(by_name, "val")[0][0] == "val/n01440764/v 0.JPEG" and list(by_name.splits) == [
        "train",
        "val",
        "test",
    ]


def test_v2_reads_folders_as_numbers(imagenet, tmp_path):
    root = tmp_path / "imagenetv2"
    put(root / "classnames.txt", "".join(f"n{i:08d} name {i}\n" for i in range(12)))
    for label in (2, 10):
        put_picture(root / f"imagenetv2-matched-frequency-format-val/{label}/a.jpeg", label)
    manifest = prepared("imagenet", root, tmp_path / "out", "--form", "v2")
    assert [label for _, label, _ in classes(manifest, "test")] == [2, 10]
    assert [name for _, _, name in classes(manifest, "test")] == ["name 2", "name 10"]


@pytest.mark.parametrize(("form", "folder"), [("adversarial", "imagenet-a"), ("rendition", "imagenet-r")])
def test_test_sets_with_some_classes_number_those(imagenet, tmp_path, form, folder):
    root = tmp_path / "set"
    put(root / folder / "README.txt", "read me")
    for number, wnid in enumerate(("n01440764", "n04008634")):
        put_picture(root / folder / wnid / "0 a.jpg", number)
    options = ["--form", form, "--classnames", str(imagenet / "classnames.txt")]
    manifest = prepared("imagenet", root, tmp_path / "out", *options)
    assert manifest.labels == ["tench", "missile (n04008634)"]
    assert [label for _, label, _ in classes(manifest, "test")] == [0, 1]


def test_what_is_missing_is_named_with_the_layout(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput, match="split_zhou_EuroSAT.json.*eurosat/2750"):
        prepared("coop-split", tmp_path / "data", tmp_path / "out", "--dataset", "eurosat")
    with pytest.raises(BadInput, match="data: split_zhou_EuroSAT.json not there"):  # named once for all splits
        prepared("coop-split", tmp_path / "data", tmp_path / "out", "--dataset", "eurosat")
    with pytest.raises(BadInput, match="one of them"):
        prepared("coop-split", tmp_path / "data", tmp_path / "out")
