"""Miniatures of the folders that headers of recipes call DATA/NAME: a few records of each split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.sources.coop_split import DATASETS
from tests.helpers.data.films import film
from tests.helpers.data.miniatures import put, put_picture

# Number of a picture of COCO -> its folder and its split by Karpathy.
COCO = {
    1: ("train2014", "train"),
    2: ("train2014", "train"),
    3: ("val2014", "restval"),
    4: ("val2014", "val"),
    5: ("val2014", "val"),
    6: ("val2014", "test"),
    7: ("val2014", "test"),
    8: ("test2015", None),
}
ANSWERS = ["red", "blue", "red", "round"]


def _ten(number: int) -> list[dict[str, Any]]:
    said = [ANSWERS[number % 4]] * 7 + ["big"] * 3
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(said)]


def _coco_name(number: int) -> str:
    folder = COCO[number][0]
    return f"{folder}/COCO_{folder}_{number:012d}.jpg"


def coco(root: Path) -> None:
    """Pictures, and Karpathy's file with two captions of each."""
    images = []
    for number, (folder, split) in COCO.items():
        put_picture(root / _coco_name(number), number)
        if split is not None:
            said = [{"raw": f"a {word} circle", "sentid": 10 * number + k} for k, word in enumerate(("red", "big"))]
            name = _coco_name(number).split("/")[1]
            head = {"filepath": folder, "filename": name, "imgid": number, "cocoid": number, "split": split}
            images.append(head | {"sentences": said})
    put(root / "dataset_coco.json", {"dataset": "coco", "images": images})


def vqav2(root: Path) -> None:
    """Official questions and annotations, ten for each picture, so that answers get into the published list."""
    coco(root)
    for subtype in ("train2014", "val2014", "test2015"):
        asked = [(n, 1000 * n + k) for n, (folder, _) in COCO.items() if folder == subtype for k in range(10)]
        rows = [{"image_id": n, "question_id": q, "question": "what color is it?"} for n, q in asked]
        put(root / f"v2_OpenEnded_mscoco_{subtype}_questions.json", {"questions": rows})
        head = {"question_type": "what color", "answer_type": "other"}
        noted = [
            head | {"image_id": n, "question_id": q, "multiple_choice_answer": ANSWERS[n % 4], "answers": _ten(n)}
            for n, q in asked
        ]
        if subtype != "test2015":
            put(root / f"v2_mscoco_{subtype}_annotations.json", {"annotations": noted})


def gqa(root: Path) -> None:
    for split, first in (("train", 0), ("val", 4), ("testdev", 8)):
        rows = {
            f"{first + k:08d}": {"question": "is it red?", "imageId": f"{first + k}", "answer": ("yes", "no")[k % 2]}
            for k in range(4)
        }
        put(root / f"questions1.2/{split}_balanced_questions.json", rows)
        for k in range(4):
            put_picture(root / f"images/{first + k}.jpg", first + k)


def nlvr2(root: Path) -> None:
    for split in ("train", "dev", "test1"):
        rows = []
        for pair in range(2):
            for side in (0, 1):
                folder = f"images/{split}" + ("/7" if split == "train" else "")
                put_picture(root / folder / f"{split}-{pair}-0-img{side}.png", 4 * pair + side, "PNG")
            names = [f"{split}-{pair}-0-{k}" for k in (0, 1)]
            labels = ("True", "False")
            rows += [
                {"identifier": name, "sentence": "there is a circle", "label": label, "directory": 7}
                for name, label in zip(names, labels, strict=True)
            ]
        put(root / f"nlvr2/data/{split}.json", "\n".join(map(json.dumps, rows)))


def snli_ve(root: Path) -> None:
    labels = ("entailment", "neutral", "contradiction")
    for place, split in enumerate(("train", "dev", "test")):
        rows = [
            {"Flickr30K_ID": f"{10 * place + k // 3}", "pairID": f"{place}.jpg#{k}", "gold_label": labels[k % 3]}
            | {"sentence2": "It is a red circle."}
            for k in range(6)
        ]
        put(root / f"snli_ve_{split}.jsonl", "\n".join(map(json.dumps, rows)))
        for k in range(2):
            put_picture(root / f"flickr30k-images/{10 * place + k}.jpg", 10 * place + k)


def flickr30k(root: Path) -> None:
    images = []
    for number, split in enumerate(("train", "train", "val", "val", "test", "test")):
        put_picture(root / f"flickr30k-images/{100 + number}.jpg", number)
        said = [{"raw": f"a {word} circle", "sentid": 2 * number + k} for k, word in enumerate(("blue", "big"))]
        images.append({"filename": f"{100 + number}.jpg", "imgid": number, "split": split, "sentences": said})
    put(root / "dataset_flickr30k.json", {"images": images})


def vizwiz_vqa(root: Path) -> None:
    for place, split in enumerate(("train", "val", "test")):
        rows = []
        for k in range(3):
            name = f"VizWiz_{split}_{k:08d}.jpg"
            put_picture(root / split / name, 4 * place + k)
            answered = {"answers": _ten(k), "answer_type": "other", "answerable": 1} if split != "test" else {}
            rows.append({"image": name, "question": "What is it?"} | answered)
        put(root / f"Annotations/{split}.json", rows)


def vizwiz_captions(root: Path) -> None:
    for place, split in enumerate(("train", "val", "test")):
        images = [{"id": 10 * place + k, "file_name": f"VizWiz_{split}_{k:08d}.jpg"} for k in range(2)]
        rows = [
            {"id": 20 * place + k, "image_id": 10 * place + k // 2, "caption": "A red circle.", "is_precanned": False}
            | {"is_rejected": k == 1}
            for k in range(4)
        ]
        put(root / f"annotations/{split}.json", {"images": images} | ({"annotations": rows} if place < 2 else {}))
        for k, image in enumerate(images):
            put_picture(root / split / image["file_name"], 4 * place + k)


def textcaps(root: Path) -> None:
    for place, split in enumerate(("train", "val", "test")):
        names = [f"{16 * place + k:016x}" for k in range(2)]
        rows = [{"image_id": name, "caption_id": k, "caption_str": "a big square"} for k, name in enumerate(names)]
        if split == "test":
            rows = [{"image_id": name} for name in names]
        put(root / f"TextCaps_0.1_{split}.json", {"dataset_type": split, "data": rows})
        folder = "test_images" if split == "test" else "train_images"
        for k, name in enumerate(names):
            put_picture(root / folder / f"{name}.jpg", 4 * place + k)


def didemo(root: Path) -> None:
    for place, split in enumerate(("train", "val", "test")):
        rows = []
        for k in range(4):
            name = f"{place}@N00_{k // 2}_ab.mp4"
            rows.append({"annotation_id": 4 * place + k, "video": name, "description": "a red circle"})
            film(root / "videos" / name, seconds=1)
        put(root / f"{split}_data.json", [row | {"times": [[0, 0]]} for row in rows])


def msrvtt(root: Path) -> None:
    """Clips of the official train, val and test; 1k-A tests on two of the last."""
    numbers = {"train": (1, 2), "val": (6600, 6601), "test": (9000, 9001)}
    for number in (n for some in numbers.values() for n in some):
        film(root / f"videos/all/video{number}.mp4", seconds=1)
    sentences = [
        {"video_id": f"video{n}", "caption": f"a {w} circle"}
        for some in numbers.values()
        for n in some
        for w in ("red", "big")
    ]
    put(root / "MSRVTT_data.json", {"videos": [], "sentences": sentences})
    lines = [f"ret{k},msr{n},video{n},a blue square" for k, n in enumerate(numbers["test"])]
    put(root / "MSRVTT_JSFUSION_test.csv", "\n".join(["key,vid_key,video_id,sentence", *lines]))
    for place, (split, some) in enumerate(numbers.items()):
        rows = [
            {
                "answer": "red",
                "category_id": 1,
                "id": 10 * place + k,
                "question": "what is it ?",
                "video_id": some[k % 2],
            }
            for k in range(4)
        ]
        put(root / f"{split}_qa.json", rows)


def msvd(root: Path) -> None:
    names = [f"-_x{n}_0_2" for n in range(6)]
    put(root / "youtube_mapping.txt", "\n".join(f"{name} vid{n + 1}" for n, name in enumerate(names)))
    for name in names:
        film(root / f"YouTubeClips/{name}.avi", seconds=1)
    for place, split in enumerate(("train", "val", "test")):
        rows = [
            {"answer": "red", "id": 4 * place + k, "question": "what is it ?", "video_id": 2 * place + k % 2 + 1}
            for k in range(4)
        ]
        put(root / f"{split}_qa.json", rows)


def llava(root: Path) -> None:
    for place, split in enumerate(("train", "val")):
        rows = []
        for k in range(3):
            name = f"coco/train2017/{4 * place + k}.jpg"
            put_picture(root / name, 4 * place + k)
            turns = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "a circle"}]
            rows.append({"id": str(k), "image": name, "conversations": turns})
        put(root / f"{split}.json", rows)


def clips(root: Path) -> None:
    for split in ("train", "val"):
        rows = []
        for k in range(3):
            film(root / f"{split}/{k}.mp4", seconds=1 + k)
            turns = [{"from": "human", "value": "<video>\nwhat is it"}, {"from": "gpt", "value": "a circle"}]
            rows.append({"id": str(k), "video": f"{split}/{k}.mp4", "conversations": turns})
        put(root / f"{split}.json", rows)


def coop(root: Path) -> None:
    """Every data set of CoOp's that has a split file: two classes, two pictures a class and split."""
    for known in (known for known in DATASETS.values() if known.file):
        splits: dict[str, list[Any]] = {}
        for place, split in enumerate(("train", "val", "test")):
            names = [(f"{split}/{label}{k}.jpg", label) for label in (0, 1) for k in range(2)]
            splits[split] = [[name, label, ("red_circle", "blue_square")[label]] for name, label in names]
            for k, (name, _) in enumerate(names):
                put_picture(root / known.folder / known.pictures / name, 4 * place + k)
        put(root / known.folder / f"split_zhou_{known.file}.json", splits)


# Name of the folder below DATA -> what makes its miniature.
LAYOUTS: dict[str, Callable[[Path], None]] = {
    "clips": clips,
    "coco": coco,
    "coop": coop,
    "didemo": didemo,
    "flickr30k": flickr30k,
    "gqa": gqa,
    "llava": llava,
    "msrvtt": msrvtt,
    "msvd": msvd,
    "nlvr2": nlvr2,
    "snli-ve": snli_ve,
    "talks": llava,
    "textcaps": textcaps,
    "vizwiz-captions": vizwiz_captions,
    "vizwiz-vqa": vizwiz_vqa,
    "vqav2": vqav2,
}
