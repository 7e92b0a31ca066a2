"""SNLI-VE: whether a picture entails, contradicts or leaves open a sentence.

A sample is a picture with all its hypotheses.

snli_ve_{train,dev,test}.jsonl with Flickr30k's pictures in flickr30k-images/ (or flickr30k_images/). The picture's key
has three spellings in public use, with or without .jpg: all are read, as are ALBEF's and LAVIS's rows {image,
sentence, label} (also in snli_ve_{train,dev,test}.json). Each question is the hypothesis; its answer
`entailment`, `neutral` or `contradiction`, in words, since the published class numbers differ from code to code.
p-Adapter's words (Correct, Ambiguous, Incorrect) are given with `--words p-adapter`; that mapping is inferred, it
stands in no published code. Source of the facts: specs/datasets.md 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from data_prep.sources.common import annotations
from data_prep.sources.common.entry import Aside, Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

KEYS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID", "image")  # the last in rows of ALBEF and LAVIS
LABELS = ["entailment", "neutral", "contradiction"]
P_ADAPTER = dict(zip(LABELS, ("Correct", "Ambiguous", "Incorrect"), strict=True))
FOLDERS = ("flickr30k-images", "flickr30k_images")


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        words: the answers: the data set's labels (official), or Correct, Ambiguous and Incorrect (p-adapter).
    """

    words: Literal["official", "p-adapter"] = "official"


class SnliVe(LayoutSource):
    Options = Options
    title = "SNLI-VE"
    origin = "github.com/necla-ml/SNLI-VE (annotations); Flickr30k's authors (pictures)"
    layout = "snli_ve_{train,dev,test}.jsonl, flickr30k-images/*.jpg"
    licence = "CC-BY-SA-4.0; pictures for research, under the terms of Flickr"
    expected = {
        "train": {"pictures": 29_783, "texts": 529_527},
        "dev": {"pictures": 1_000, "texts": 17_858},
        "test": {"pictures": 1_000, "texts": 17_901},
    }

    def files(self) -> dict[str, list[str]]:
        names = {split: f"snli_ve_{split}.json" for split in ("train", "dev", "test")}
        return {s: [self.first_there(f"{name}l", f"data/{name}l", name)] for s, name in names.items()}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        return index.parsed(split, annotations.records(self.root / self.files()[split][0]), self._entry)

    def _entry(self, row: Any) -> Entry:
        pair = row.get("pairID")
        label = row["label"] if "label" in row and "gold_label" not in row else row["gold_label"]
        if label not in LABELS:
            raise Aside("no gold label", _name(row))
        image = next((row[key] for key in KEYS if row.get(key)), None)
        if image is None:
            raise Aside(f"none of the keys {', '.join(KEYS)}", _name(row))
        image = PurePosixPath(str(annotations.identifier(image))).name
        image = image[:-4] if image.lower().endswith(".jpg") else image
        spelled = "sentence" if "sentence" in row and "sentence2" not in row else "sentence2"
        hypothesis = annotations.text(row[spelled])
        if not hypothesis.strip():
            raise Aside("hypothesis empty", _name(row))
        answer = P_ADAPTER[label] if self.options.words == "p-adapter" else label
        item = {"question": hypothesis, "answers": [answer]}
        if pair is not None:
            item["question_id"] = annotations.identifier(pair)
        name = f"{image}.jpg"
        return Entry(name, [name], item, {"image_id": image}, key=None if pair is None else str(pair))

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return fields | {"questions": items}

    def labels(self, split: str) -> list[str]:
        return list(P_ADAPTER.values()) if self.options.words == "p-adapter" else LABELS

    def locate(self, name: str) -> Path:
        there = (self.pictures_root / folder / name for folder in (*FOLDERS, "."))
        return next((path for path in there if path.exists()), self.pictures_root / FOLDERS[0] / name)


def _name(row: dict[str, Any]) -> str:
    """A row in the list of those that were set aside: its pair, or in rows without one its picture."""
    return str(row.get("pairID") or row.get("image") or row.get("sentence2") or row.get("sentence"))


ENTRY = SnliVe
