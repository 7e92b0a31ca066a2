"""OK-VQA: questions about COCO's pictures of 2014 that need outside knowledge; val2014 is the test split.

OpenEnded_mscoco_{train2014,val2014}_questions.json and mscoco_{train2014,val2014}_annotations.json. `answers` are the
ten normalised ones (`answer`, not `raw_answer`). The list of answers is made of the training split: all that any
annotator gave, the most frequent first. Source of the facts: specs/datasets.md 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.sources.common import coco, questions
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions

SUBTYPES = {"train": "train2014", "test": "val2014"}
LISTED = "listed"


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        min_answer_count: an answer is listed if annotators gave it so often in training.
    """

    min_answer_count: int = 1


class OkVqa(coco.CocoSource):
    Options = Options
    title = "OK-VQA"
    origin = "okvqa.allenai.org and cocodataset.org"
    layout = (
        "OpenEnded_mscoco_{train2014,val2014}_questions.json, mscoco_{train2014,val2014}_annotations.json, "
        "train2014/*.jpg, val2014/*.jpg"
    )
    licence = "CC-BY-4.0; pictures under the terms of Flickr"
    expected = {
        "train": {"pictures": 8_998, "texts": 9_009},
        "test": {"pictures": 5_033, "texts": 5_046},
    }

    def files(self) -> dict[str, list[str]]:
        return {split: [self._questions(split), self._annotations(split)] for split in SUBTYPES}

    def also_read(self) -> list[str]:
        return [self._annotations("train")]

    def begin(self, index: Index) -> None:
        """The annotations of both splits, where they are there, and the list of answers."""
        for split in SUBTYPES:
            if (file := self.root / self._annotations(split)).is_file():
                questions.put_answers(index, file, split, split if split in self.chosen() else "")
        rows = index.values(f"{questions.ANSWERS} train")
        least = self.options.min_answer_count
        index.keep(LISTED, questions.given_answers(index, rows, questions.answers_of, at_least=least))

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        folder, listed = SUBTYPES[split], set(index.kept(LISTED))
        file = self.root / self._questions(split)

        def path(row: Any) -> str:
            return coco.picture(folder, row["image_id"])

        return questions.official(file, split, split, index, path, listed, "official", True, True)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return questions.record(items, fields)

    def labels(self, split: str) -> list[str] | None:
        return self._of().kept(LISTED) or None

    def _questions(self, split: str) -> str:
        return f"OpenEnded_mscoco_{SUBTYPES[split]}_questions.json"

    def _annotations(self, split: str) -> str:
        return f"mscoco_{SUBTYPES[split]}_annotations.json"


ENTRY = OkVqa
