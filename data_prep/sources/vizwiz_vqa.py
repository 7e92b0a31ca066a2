"""VizWiz-VQA: questions of blind people about their own pictures, ten answers each.

Annotations/{train,val,test}.json with pictures in train/, val/ and test/; test has no answers. `unanswerable` is an
answer like any other. Names of an older release have twelve digits. The list of answers is made of the training split:
all that any annotator gave so often. Source of the facts: specs/datasets.md 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.sources.common import annotations, questions
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

SPLITS = ("train", "val", "test")
LISTED = "listed"


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        min_answer_count: an answer is listed if annotators gave it so often in training.
    """

    min_answer_count: int = 5


class VizWizVqa(LayoutSource):
    Options = Options
    title = "VizWiz-VQA"
    origin = "vizwiz.org (Annotations.zip, train.zip, val.zip, test.zip)"
    layout = "Annotations/{train,val,test}.json, train/*.jpg, val/*.jpg, test/*.jpg"
    licence = "CC-BY-4.0"
    expected = {"val": {"texts": 4_319}, "test": {"texts": 8_000}}

    def files(self) -> dict[str, list[str]]:
        return {s: [self.first_there(f"Annotations/{s}.json", f"annotations/{s}.json", f"{s}.json")] for s in SPLITS}

    def also_read(self) -> list[str]:
        return self.files()["train"]

    def begin(self, index: Index) -> None:
        """The list of answers, the most frequent first."""
        train = self.root / self.files()["train"][0]
        rows = annotations.items(train) if train.is_file() else ()
        of_row, least = questions.answers_of, self.options.min_answer_count
        index.keep(LISTED, questions.given_answers(index, rows, of_row, lambda row: row["image"], least))

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        listed = set(index.kept(LISTED))

        def entry(row: Any) -> Entry:
            image = annotations.text(row["image"])
            item = {"question": annotations.text(row["question"]), "answers": [], "question_id": image}
            if split != "test" or "answers" in row:
                item |= questions.of_annotation(row, image)
                item["scores"] = questions.soft_targets(item["answers"], listed, "official")
            name = f"{split}/{image}"
            fields = {"answerable": row["answerable"]} if "answerable" in row else {}
            return Entry(name, [name], item, fields, key=image)

        return index.parsed(split, annotations.items(self.root / self.files()[split][0]), entry)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return questions.record(items, fields)

    def labels(self, split: str) -> list[str] | None:
        return self._of().kept(LISTED) or None


ENTRY = VizWizVqa
