"""NLVR2: whether a sentence is true of two pictures. A sample is a pair of pictures with all its sentences.

`--form official`  nlvr2/data/{train,dev,test1,test2}.json, one object a line (also directly below the root)
                   with `--subset balanced` or `unbalanced` nlvr2/data/<subset>/<subset>_{dev,test1}.json
`--form blip`      nlvr_{train,dev,test}.json
Pictures lie in images/train/<directory>/, dev/, test1/ and test2/ (the last is our choice: no source names it). Each
question is the sentence, its answer `true` or `false`. The official form keeps `identifier` as `question_id`, of which
`launchers/score.py` computes consistency. Source of the facts: specs/datasets.md 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations
from data_prep.sources.common.entry import Aside, Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

OFFICIAL = ("train", "dev", "test1", "test2")
SUBSETS = {"balanced": {"dev": 2_300, "test1": 2_316}, "unbalanced": {"dev": 3_562, "test1": 3_536}}  # sentences
ANSWERS = ["true", "false"]


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        form: whose files are read: the publishers' (official) or BLIP's lists.
        subset: of the official dev and test1: all sentences, or the balanced or unbalanced ones.
    """

    form: Literal["official", "blip"] = "official"
    subset: Literal["all", "balanced", "unbalanced"] = "all"


class Nlvr2(LayoutSource):
    Options = Options
    title = "NLVR2"
    origin = "github.com/lil-lab/nlvr (annotations) and its authors (pictures)"
    layout = "nlvr2/data/{train,dev,test1,test2}.json, images/train/<0..99>/*.png, dev/*.png, test1/*.png"
    licence = "CC-BY-4.0; pictures under the terms of their sites"
    expected = {
        "train": {"texts": 86_373},
        "dev": {"texts": 6_982, "samples": 4_051},
        "test1": {"texts": 6_967, "samples": 4_041},
        "test2": {"texts": 6_970, "samples": 4_074},
    }

    def files(self) -> dict[str, list[str]]:
        if self.options.form == "blip":
            return {
                s: [self.first_there(f"nlvr_{s}.json", f"annotations/nlvr_{s}.json")] for s in ("train", "dev", "test")
            }
        if (subset := self.options.subset) != "all":
            names = {split: f"data/{subset}/{subset}_{split}.json" for split in SUBSETS[subset]}
            return {split: [self.first_there(f"nlvr2/{name}", name)] for split, name in names.items()}
        return {s: [self.first_there(f"nlvr2/data/{s}.json", f"data/{s}.json", f"{s}.json")] for s in OFFICIAL}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        file = self.root / self.files()[split][0]
        if self.options.form == "blip":
            return index.parsed(split, annotations.items(file), self._of_blip)
        return index.parsed(split, annotations.records(file), lambda row: self._official(row, split))

    def _official(self, row: Any, split: str) -> Entry:
        identifier = annotations.text(row["identifier"])
        pair = identifier.rsplit("-", 1)[0]
        folder = f"images/train/{row['directory']}" if split == "train" else split
        item = self._item(row["sentence"], row["label"], identifier) | {"question_id": identifier}
        return Entry(pair, [f"{folder}/{pair}-img{k}.png" for k in (0, 1)], item, {}, key=identifier)

    def _of_blip(self, row: Any) -> Entry:
        files = [annotations.text(name) for name in row["images"]]
        if len(files) != 2:
            raise Aside("not two pictures", str(row["images"])[:60])
        return Entry(" ".join(files), files, self._item(row["sentence"], row["label"], files[0]), {})

    @staticmethod
    def _item(sentence: Any, label: Any, name: str) -> dict[str, Any]:
        answer = str(label).lower()
        if answer not in ANSWERS:
            raise Aside("label neither True nor False", name)
        if not annotations.text(sentence).strip():
            raise Aside("sentence empty", name)
        return {"question": sentence, "answers": [answer]}

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return {"questions": items}

    def labels(self, split: str) -> list[str]:
        return ANSWERS

    def locate(self, name: str) -> Path:
        plain = self.pictures_root / name
        return plain if plain.exists() else self.pictures_root / "images" / name

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        if self.options.form == "blip":
            return account | {"expected": {}}
        if self.options.subset != "all" and not self.options.limit:
            return account | {"expected": {"texts": SUBSETS[self.options.subset][split]}}
        return account


ENTRY = Nlvr2
