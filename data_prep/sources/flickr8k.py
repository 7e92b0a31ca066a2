"""Flickr8k: Flickr8k.token.txt with the lists Flickr_8k.{trainImages,devImages,testImages}.txt.

Pictures lie in Flicker8k_Dataset/ (so spelt). The token file names one picture that does not exist. GA-Net trains on a
random 80 % with one caption per picture (specs/ganet.md 1.9), not on the official split, which is prepared here.
Source of the facts: specs/datasets.md 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.sources.common import annotations, captions
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

TOKENS = "Flickr8k.token.txt"
LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}


class Flickr8k(LayoutSource):
    Options = LayoutOptions
    title = "Flickr8k"
    origin = "its authors at Illinois"
    layout = "Flicker8k_Dataset/*.jpg, Flickr8k.token.txt, Flickr_8k.{trainImages,devImages,testImages}.txt"
    licence = "for research, under the terms of Flickr"
    expected = {"train": {"pictures": 6_000}, "val": {"pictures": 1_000}, "test": {"pictures": 1_000}}

    def files(self) -> dict[str, list[str]]:
        def there(name: str) -> str:
            return self.first_there(name, f"Flickr8k_text/{name}")

        return {s: [there(TOKENS), there(f"Flickr_8k.{name}.txt")] for s, name in LISTS.items()}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        tokens, names = self.files()[split]
        wanted = captions.names(self.root / names, split, index)
        listed = self._listed() if split == self.chosen()[0] else None
        return captions.tokens(self.root / tokens, split, index, "Flicker8k_Dataset", wanted, listed)

    def _listed(self) -> set[str]:
        """Pictures of all lists that are there."""
        lists = [self.root / names for _, names in self.files().values()]
        return {line.strip() for file in lists if file.is_file() for line in annotations.lines(file)}

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return captions.record(items, fields)


ENTRY = Flickr8k
