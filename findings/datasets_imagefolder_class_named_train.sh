#!/usr/bin/env bash
# datasets: load_dataset("imagefolder") of class folders of which one is called "train" loads that class alone, without labels.
#
# A good guess: folders of pictures, one for each class, become one split of all pictures with the folders' names as labels, as
#   they do for bus/, car/ and boat/; only folders that hold class folders themselves are splits.
# What happens: if any path holds a word for a split, between separators, all files are divided by such words and those without one
#   are dropped, with no warning. With bus/, car/ and train/ what remains is the pictures of trains; as they are all of one folder
#   their label is dropped too. "bullet_train" does it likewise, and so does one file name: beside "crash-test-3.png" no other
#   picture of the folder is loaded.
# Source: datasets.data_files: SPLIT_KEYWORDS, and get_data_patterns, which takes the first kind of pattern that fits anything.
# Who is hurt: those who keep classes of COCO, PASCAL VOC, CIFAR-100 or DomainNet in folders: each of them has a "train".
. "$(dirname "$0")/_lib.sh"
pins datasets==5.2.0 pillow==13.0.0 numpy==2.4.6

observe <<'PY'
import os
import datasets
from PIL import Image

datasets.disable_progress_bars()
seen = {}
for third in ("boat", "bullet_train", "trains", "train"):
    for name in ("bus", "car", third):
        os.makedirs(f"with_{third}/{name}")
        for index in range(5):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(f"with_{third}/{name}/{index}.png")
    loaded = datasets.load_dataset("imagefolder", data_dir=f"with_{third}")
    seen[third] = {split: (len(part), part.features["label"].names if "label" in part.features else None)
                   for split, part in loaded.items()}
    print(f"15 pictures in bus/, car/ and {third}/:", seen[third])
for third in ("boat", "trains"):
    assert seen[third] == {"train": (15, ["boat", "bus", "car"] if third == "boat" else ["bus", "car", "trains"])}
for third in ("train", "bullet_train"):
    assert seen[third] == {"train": (5, None)}
asked = datasets.load_dataset("imagefolder", data_dir="with_train", drop_labels=False)["train"]
print("with drop_labels=False:", len(asked), asked.features["label"].names)
assert len(asked) == 5 and asked.features["label"].names == ["train"]
os.rename("with_boat/bus/3.png", "with_boat/bus/crash-test-3.png")
one_file = datasets.load_dataset("imagefolder", data_dir="with_boat")
print("15 pictures, one of them called crash-test-3.png:", {split: len(part) for split, part in one_file.items()})
assert {split: len(part) for split, part in one_file.items()} == {"test": 1}
given = datasets.load_dataset("imagefolder", data_files={"train": "with_train/**"})["train"]
print("with data_files:", len(given), given.features["label"].names)
assert len(given) == 15 and given.features["label"].names == ["bus", "car", "train"]
PY
