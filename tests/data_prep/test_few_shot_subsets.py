"""Few-shot subsets as CoOp draws them, halves of the classes, and CoOp's own split files."""

import json
import random
from collections import Counter

import pytest

from data_prep import few_shot, prepare
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.errors import BadInput
from tests.helpers.data.images import picture

CLASSES = ["cat", "american_dog", "eel", "fox", "ant"]  # of 12, 12, 12, 12 and 3 training images


@pytest.fixture(scope="module")
def coop(tmp_path_factory):
    """A root of images and a split file whose order is neither sorted nor by class; and the prepared data set."""
    root = tmp_path_factory.mktemp("coop")
    splits = {}
    for split, count in (("train", 12), ("val", 6), ("test", 5)):
        items = [(name, i) for name in CLASSES for i in range(3 if (name, split) == ("ant", "train") else count)]
        random.Random(split).shuffle(items)
        splits[split] = []
        for name, i in items:
            path = f"images/{split}_{name}_{i}.png"
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_bytes(picture((i * 10, CLASSES.index(name), 3)))
            splits[split].append([path, CLASSES.index(name), name])
    (root / "split_zhou_Toy.json").write_text(json.dumps(splits))
    out = root / "shards"
    prepare.main(
        ["coop-split", "--root", str(root), "--splits-file", str(root / "split_zhou_Toy.json"), "--out", str(out)]
        + ["--samples-per-shard", "10", "--processes", "1"]
    )
    return root, splits, Manifest.load(out)


def dassl(items, shots):
    """What Dassl does with the module's own generator, on (path, label, name) items."""
    by_label = {}
    for item in items:
        by_label.setdefault(item[1], []).append(item)
    found = []
    for of_label in by_label.values():
        found += random.sample(of_label, shots) if len(of_label) >= shots else of_label
    return found


def chosen(manifest, name, split="train"):
    return Subset.load(f"few_shot/{name}.json", manifest, split).keys


def paths_of(splits, split, keys):
    return [splits[split][int(key.rpartition("-")[2])][0] for key in keys]


def test_the_prepared_split_keeps_order_classes_and_names(coop):
    _, splits, manifest = coop
    assert manifest.labels == CLASSES
    assert {s: manifest.samples(s) for s in manifest.splits} == {s: len(v) for s, v in splits.items()}
    records = few_shot.labels_of(manifest, "train")
    assert list(records.values()) == [name for _, _, name in splits["train"]]


@pytest.mark.parametrize(("shots", "seed"), [(1, 1), (2, 3), (8, 1), (16, 2)])
def test_the_draw_is_that_of_coop(coop, shots, seed):
    _, splits, manifest = coop
    few_shot.main([manifest.dir, "--shots", str(shots), "--seeds", str(seed)])
    random.seed(seed)
    train, val = dassl(splits["train"], shots), dassl(splits["val"], min(shots, 4))
    assert paths_of(splits, "train", chosen(manifest, f"{shots}-seed{seed}")) == [path for path, _, _ in train]
    assert paths_of(splits, "val", chosen(manifest, f"{shots}-seed{seed}-val", "val")) == [path for path, _, _ in val]


def test_every_class_has_k_samples_or_what_exists_and_none_twice(coop):
    _, splits, manifest = coop
    few_shot.main([manifest.dir, "--shots", "4", "--seeds", "5", "6"])
    names = few_shot.labels_of(manifest, "train")
    keys = chosen(manifest, "4-seed5")
    assert Counter(names[k] for k in keys) == {**dict.fromkeys(CLASSES, 4), "ant": 3}
    assert len(set(keys)) == len(keys)
    assert keys != chosen(manifest, "4-seed6")


def test_the_same_command_gives_the_same_bytes_and_another_choice_is_not_overwritten_unasked(coop):
    _, _, manifest = coop
    arguments = [manifest.dir, "--shots", "2", "--seeds", "7"]
    few_shot.main(arguments)
    from pathlib import Path

    path = Path(manifest.dir, "few_shot", "2-seed7.json")
    before = path.read_bytes()
    few_shot.main(arguments)
    assert path.read_bytes() == before
    path.write_text(before.decode().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(BadInput, match="--overwrite"):
        few_shot.main(arguments)
    few_shot.main([*arguments, "--overwrite"])
    assert path.read_bytes() == before


def test_base_and_new_halves_split_the_classes_and_the_draw(coop):
    _, _, manifest = coop
    few_shot.main([manifest.dir, "--shots", "2", "--seeds", "1", "--classes", "all", "base", "new"])
    names = few_shot.labels_of(manifest, "train")
    halves = [chosen(manifest, f"2-seed1-{half}") for half in ("base", "new")]
    assert {names[k] for k in halves[0]} == set(CLASSES[:3]) and {names[k] for k in halves[1]} == set(CLASSES[3:])
    assert sorted(halves[0] + halves[1]) == sorted(chosen(manifest, "2-seed1"))
    test_base = Subset.load("few_shot/test-base.json", manifest, "test")
    assert test_base.classes == CLASSES[:3] and len(test_base) == 15
    assert len(chosen(manifest, "test-new", "test")) == 10


def test_a_data_set_without_validation_gives_training_shots_alone(image_folder, tmp_path):
    out = tmp_path / "out"
    prepare.main(["image-folder", "--folder", str(image_folder), "--out", str(out), "--processes", "1"])
    few_shot.main([str(out), "--shots", "1", "--seeds", "1"])
    assert sorted(p.name for p in (out / "few_shot").iterdir()) == ["1-seed1.json"]
    with pytest.raises(BadInput, match="no split 'other'"):
        few_shot.main([str(out), "--split", "other"])
    with pytest.raises(BadInput, match="--shots"):
        few_shot.main([str(out), "--shots", "0"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": [["images/none.png", 0, "cat"]]}, "none.png"),
        ({"train": [["../secret.png", 0, "cat"]]}, "leaves the folder"),
        ({"train": [["images/a.txt", 0, "cat"]]}, "picture missing .images/a.txt."),
        ({"train": [["images/train_cat_0.png", 0]]}, "no split file"),
        ({"train": [["images/train_cat_0.png", [0], "cat"]]}, "no split file"),
        ({"train": [["images/train_cat_0.png", 0, "cat"], ["images/train_eel_0.png", 0, "eel"]]}, "class 0"),
        ({"train": [["images/train_cat_0.png", 1, "cat"]]}, "gaps"),
        ({}, "none of the splits"),
    ],
)
def test_a_split_file_that_cannot_be_used_is_refused_in_one_line(coop, tmp_path, change, words):
    root, _, _ = coop
    file = tmp_path / "split.json"
    file.write_text(json.dumps(change))
    with pytest.raises(BadInput, match=words) as caught:
        prepare.main(["coop-split", "--root", str(root), "--splits-file", str(file), "--out", str(tmp_path / "o")])
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="none.json"):
        prepare.main(["coop-split", "--root", str(root), "--splits-file", "none.json", "--out", str(tmp_path / "o")])
