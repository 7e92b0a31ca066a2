"""VizWiz captions: five captions per picture, of which workers rejected some and some are a fixed sentence.

annotations/{train,val,test}.json in COCO's form, pictures in train/, val/ and test/; test has no captions. The
official loader drops rejected and precanned captions (`--captions official`: of val's 38,750 stay 33,145); plain COCO
tools, and p-Adapter with them, keep all (`--captions all`). A picture that loses all five is no sample. Picture ids
run on over the splits, file names do not. Source of the facts: specs/datasets.md 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.sources.common import captions
from data_prep.sources.common.entry import Aside, Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

VAL_TEXTS = {"official": 33_145, "all": 38_750}  # captions that stay


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        captions: without those that were rejected or are precanned (official), or all.
    """

    captions: Literal["official", "all"] = "official"


class VizWizCaptions(LayoutSource):
    Options = Options
    title = "VizWiz captions"
    origin = "vizwiz.org (annotations.zip, train.zip, val.zip, test.zip)"
    layout = "annotations/{train,val,test}.json, train/*.jpg, val/*.jpg, test/*.jpg"
    licence = "CC-BY-4.0"
    expected = {
        "train": {"pictures": 23_431, "records": 117_155},
        "val": {"pictures": 7_750, "records": 38_750},
        "test": {"pictures": 8_000},
    }

    def files(self) -> dict[str, list[str]]:
        names = {split: f"{split}.json" for split in captions.SPLITS}
        return {s: [self.first_there(f"annotations/{n}", f"Annotations/{n}", n)] for s, n in names.items()}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        file = self.root / self.files()[split][0]

        def path(image: dict[str, Any]) -> str:
            return f"{split}/{image['file_name']}"

        if split == "test":
            return captions.uncaptioned(file, split, index, path)
        return captions.coco(file, split, index, path, self._check)

    def _check(self, row: dict[str, Any]) -> None:
        if self.options.captions == "official":
            for key, reason in (("is_rejected", "caption rejected"), ("is_precanned", "caption precanned")):
                if row.get(key):
                    raise Aside(reason, str(row["id"]))

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        texts = VAL_TEXTS[self.options.captions]
        return account | (
            {"expected": account["expected"] | {"texts": texts}} if split == "val" and account["expected"] else {}
        )

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return captions.record(items, fields)


ENTRY = VizWizCaptions
