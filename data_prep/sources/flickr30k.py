"""Flickr30k: 31,783 pictures with five captions each.

`--form karpathy`  dataset_flickr30k.json (29,000 / 1,014 / 1,000; 769 pictures are in no split)
`--form tokens`    results_20130124.token, `name.jpg#k<TAB>caption`, all as `train`; captions are tokenised there
`--form csv`       results.csv of Kaggle's copy, bars between the columns, all as `train`
`--form blip`      flickr30k_{train,val,test}.json
Pictures lie in flickr30k-images/. Source of the facts: specs/datasets.md 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from data_prep.sources.common import annotations, captions
from data_prep.sources.common.entry import Aside, Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

FOLDER = "flickr30k-images"
ONE_FILE = {"tokens": "results_20130124.token", "csv": "results.csv"}


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        form: which files are read, see above.
    """

    form: Literal["karpathy", "tokens", "csv", "blip"] = "karpathy"


class Flickr30k(LayoutSource):
    Options = Options
    title = "Flickr30k"
    origin = "its authors at Illinois (pictures, token file); dataset_flickr30k.json from Karpathy's caption_datasets"
    layout = (
        "flickr30k-images/*.jpg and dataset_flickr30k.json, results_20130124.token, results.csv or flickr30k_*.json"
    )
    licence = "for research, under the terms of Flickr"
    expected = {"train": {"pictures": 29_000}, "val": {"pictures": 1_014}, "test": {"pictures": 1_000}}

    def files(self) -> dict[str, list[str]]:
        form = self.options.form
        if form in ONE_FILE:
            return {"train": [ONE_FILE[form]]}
        if form == "blip":
            names = {s: f"flickr30k_{s}.json" for s in captions.SPLITS}
            return {s: [self.first_there(name, f"annotations/{name}")] for s, name in names.items()}
        return {split: ["dataset_flickr30k.json"] for split in captions.SPLITS}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        file = self.root / self.files()[split][0]
        form = self.options.form
        if form == "karpathy":
            first = split == self.chosen()[0]
            return captions.karpathy(file, split, index, lambda row: f"{FOLDER}/{row['filename']}", "imgid", first)
        if form == "blip":
            return captions.blip(file, split, index, self._last_part, lambda name: PurePosixPath(name).stem)
        if form == "tokens":
            return captions.tokens(file, split, index, FOLDER)
        return index.parsed(split, self._rows(file), self._of_csv)

    @staticmethod
    def _last_part(name: str) -> str:
        """BLIP's names begin with a folder that differs from copy to copy."""
        return f"{FOLDER}/{PurePosixPath(name).name}"

    @staticmethod
    def _rows(file: Path) -> Iterator[str]:
        rows = annotations.lines(file)
        return (row for row in rows if not row.startswith("image_name|"))  # the header

    @staticmethod
    def _of_csv(line: str) -> Entry:
        """`name| k| caption`; one row of the copy in use lacks its second bar: `name| 4   caption`."""
        name, _, rest = line.partition("|")
        number, bar, caption = rest.partition("|")
        if not bar:
            number, _, caption = rest.strip().partition(" ")
        name, number = name.strip(), number.strip()
        if not name or not number.isdigit():
            raise Aside("row of another form", line[:60])
        path, key = f"{FOLDER}/{name}", f"{name}#{number}"
        item = {"caption": captions.caption(caption, key).strip()}
        return Entry(path, [path], item, {"image_id": PurePosixPath(name).stem}, key=key)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return captions.record(items, fields)

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        if self.options.form in ONE_FILE and not self.options.limit:
            account["expected"] = {"pictures": 31_783, "texts": 158_915}
        return account


ENTRY = Flickr30k
