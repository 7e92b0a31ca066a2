"""TextCaps: captions that read the text in a picture.

TextCaps_0.1_{train,val,test}.json with pictures in train_images/ (train and val) and test_images/. A row is a caption;
test rows have none. Picture ids are texts of 16 hexadecimal digits. Source of the facts: specs/datasets.md 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.sources.common import annotations, captions
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource


class TextCaps(LayoutSource):
    Options = LayoutOptions
    title = "TextCaps"
    origin = "textvqa.org/textcaps (train_val_images.zip, test_images.zip)"
    layout = "TextCaps_0.1_{train,val,test}.json, train_images/*.jpg, test_images/*.jpg"
    licence = "CC-BY-4.0"
    expected = {"train": {"pictures": 21_953}, "val": {"pictures": 3_166}}

    def files(self) -> dict[str, list[str]]:
        return {split: [f"TextCaps_0.1_{split}.json"] for split in captions.SPLITS}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        folder = "test_images" if split == "test" else "train_images"

        def entry(row: Any) -> Entry:
            image = annotations.text(row["image_id"])
            name = f"{folder}/{image}.jpg"
            item = None
            if split != "test":
                number = annotations.identifier(row["caption_id"])
                item = {"caption": captions.caption(row["caption_str"], str(number)), "id": number}
            return Entry(name, [name], item, {"image_id": image}, key=str(row.get("caption_id", image)))

        return index.parsed(split, annotations.items(self.root / self.files()[split][0], "data"), entry)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return captions.record(items, fields)


ENTRY = TextCaps
