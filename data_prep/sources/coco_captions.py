"""COCO captions: the official files of 2014, Karpathy's split of them, or the lists of BLIP.

`--form official`   annotations/captions_{train,val}2014.json (splits train and val)
`--form karpathy`   dataset_coco.json (train with restval, whose pictures lie in val2014; val and test of 5,000 each)
`--form blip`       coco_karpathy_{train,val,test}.json
Pictures lie in train2014/ and val2014/. A sample is a picture with all its captions, as they were written.
Source of the facts: specs/datasets.md 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from data_prep.sources.common import captions
from data_prep.sources.common.coco import CocoSource
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions

ANNOTATIONS = "annotations/captions_{}2014.json"
BLIP = "coco_karpathy_{}.json"


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        form: whose files are read: the publishers' (official), Karpathy's split or BLIP's lists.
    """

    form: Literal["official", "karpathy", "blip"] = "karpathy"


class CocoCaptions(CocoSource):
    Options = Options
    title = "COCO captions"
    origin = "cocodataset.org (train2014, val2014, annotations); dataset_coco.json from Karpathy's caption_datasets"
    layout = (
        "train2014/*.jpg, val2014/*.jpg, and annotations/captions_*2014.json, dataset_coco.json or "
        "coco_karpathy_*.json"
    )
    licence = "annotations CC-BY-4.0; pictures under the terms of Flickr"
    expected = {
        "train": {"pictures": 113_287, "texts": 566_747},
        "val": {"pictures": 5_000, "texts": 25_010},
        "test": {"pictures": 5_000, "texts": 25_010},
    }

    def files(self) -> dict[str, list[str]]:
        if self.options.form == "official":
            return {split: [ANNOTATIONS.format(split)] for split in ("train", "val")}
        if self.options.form == "blip":
            names = {split: BLIP.format(split) for split in captions.SPLITS}
            return {split: [self.first_there(name, f"annotations/{name}")] for split, name in names.items()}
        return {split: [self.first_there(*captions.COCO_KARPATHY)] for split in captions.SPLITS}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        file = self.root / self.files()[split][0]
        if self.options.form == "karpathy":
            yield from captions.karpathy(file, split, index, karpathy_path, "cocoid", split == self.chosen()[0])
        elif self.options.form == "blip":
            yield from captions.blip(file, split, index, str, coco_id)
        else:
            folder = f"{split}2014"
            yield from captions.coco(file, split, index, lambda image: f"{folder}/{image['file_name']}")

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return captions.record(items, fields)

    def account(self, split: str) -> dict[str, Any]:
        official = {"train": {"pictures": 82_783, "texts": 414_113}, "val": {"pictures": 40_504, "texts": 202_654}}
        account = super().account(split)
        if self.options.form == "official" and not self.options.limit:
            account["expected"] = official[split]
        return account


def karpathy_path(image: dict[str, Any]) -> str:
    """Path of a picture in Karpathy's file: pictures of `restval` lie in val2014."""
    return f"{image['filepath']}/{image['filename']}"


def coco_id(path: str) -> int:
    """The picture's number of `val2014/COCO_val2014_000000522418.jpg`. Raises ValueError for another name."""
    return int(PurePosixPath(path).stem.rsplit("_", 1)[-1])


ENTRY = CocoCaptions
