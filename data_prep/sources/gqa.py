"""GQA: compositional questions with one answer each, from questions1.2/ or LXMERT's files.

`--form official`  {train,val,testdev,test,challenge}_balanced_questions.json, with `--all` the whole sets
                   ({val,testdev,test,challenge,submission}_all_questions.json and the files in train_all_questions/)
`--form lxmert`    train.json, valid.json, testdev.json, submit.json
Pictures lie in images/ (those of LXMERT's files in VG/VG_100K/ or images/). Ids are texts with leading zeros and stay
so. Test, challenge and submission have no answers. The list of answers is made of the training questions of the form;
for LXMERT's it is trainval_label2ans.json or trainval_ans2label.json where one is there.
Source of the facts: specs/datasets.md 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations, questions
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

ANSWERED = ("train", "val", "testdev")
OFFICIAL = (*ANSWERED, "test", "challenge")
LXMERT = {"train": "train", "valid": "valid", "testdev": "testdev", "submit": "submit"}
# What the whole sets count, where sources give more than a rounded number.
ALL = {
    "testdev": {"texts": 172_174},
    "test": {"pictures": 2_993, "texts": 1_340_048},
    "challenge": {"texts": 713_449},
}
LISTED = "listed"


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        form: whose files are read: the publishers' (official) or LXMERT's.
        all: the whole question sets in place of the balanced ones, which measures are made for.
    """

    form: Literal["official", "lxmert"] = "official"
    all: bool = False


class Gqa(LayoutSource):
    Options = Options
    title = "GQA"
    origin = "cs.stanford.edu/people/dorarad/gqa"
    layout = "questions1.2/{train,val,testdev,test,challenge}_balanced_questions.json, images/*.jpg"
    licence = "CC-BY-4.0"
    expected = {
        "train": {"pictures": 72_140, "texts": 943_000},
        "val": {"pictures": 10_234, "texts": 132_062},
        "testdev": {"pictures": 398, "texts": 12_578},
        "test": {"pictures": 2_987, "texts": 95_336},
        "challenge": {"pictures": 1_590, "texts": 50_726},
    }

    def files(self) -> dict[str, list[str]]:
        if self.options.form == "lxmert":
            return {s: [self.first_there(f"{name}.json", f"gqa/{name}.json")] for s, name in LXMERT.items()}
        return {split: self._official(split) for split in (*OFFICIAL, *(["submission"] if self.options.all else []))}

    def begin(self, index: Index) -> None:
        """The list of answers of the training questions, the most frequent first."""
        files = [file for name in self.files()["train"] if (file := self.root / name).is_file()]
        published = self.root / self._published_list()
        if self.options.form == "lxmert" and published.is_file():
            index.keep(LISTED, questions.check_listed(annotations.json_value(published), published))
        elif self.options.form == "lxmert":
            rows = itertools.chain.from_iterable(annotations.items(file) for file in files)
            index.keep(
                LISTED, questions.given_answers(index, rows, lambda row: row["label"], lambda row: row["question_id"])
            )
        else:
            pairs = itertools.chain.from_iterable(annotations.pairs(file) for file in files)
            listed = questions.given_answers(index, pairs, lambda pair: [pair[1]["answer"]], lambda pair: pair[0])
            index.keep(LISTED, listed)

    def also_read(self) -> list[str]:
        return [*self.files()["train"], *([self._published_list()] if self.options.form == "lxmert" else [])]

    def _published_list(self) -> str:
        """File of LXMERT's answer list."""
        names = ("trainval_label2ans.json", "trainval_ans2label.json")
        return self.first_there(*(folder + name for name in names for folder in ("", "gqa/")))

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        for name in self.files()[split]:
            file = self.root / name
            if self.options.form == "lxmert":
                rows = annotations.items(file)
                yield from questions.scored(rows, split, index, lambda image: f"{image}.jpg", split != "submit")
            else:
                yield from index.parsed(split, annotations.pairs(file), lambda pair: self._entry(pair, split))

    @staticmethod
    def _entry(pair: tuple[str, Any], split: str) -> Entry:
        number, row = pair
        item = {"question": annotations.text(row["question"]), "question_id": number, "answers": []}
        if split in ANSWERED:
            item["answers"] = questions.answered([row["answer"]], number)
        item |= questions.types_of(row.get("types") or {}, type="structural", question_type="semantic")
        image = annotations.text(row["imageId"])
        name = f"images/{image}.jpg"
        return Entry(name, [name], item, {"image_id": image}, key=number)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return questions.record(items, fields)

    def labels(self, split: str) -> list[str] | None:
        return self._of().kept(LISTED) or None

    def locate(self, name: str) -> Path:
        """LXMERT's training pictures may lie with Visual Genome's."""
        plain = self.pictures_root / name
        if self.options.form != "lxmert" or plain.exists():
            return plain
        folders = ("images", "GQA/images", "VG/VG_100K", "VG_100K", "VG/VG_100K_2", "VG_100K_2")
        there = (self.pictures_root / folder / name for folder in folders)
        return next((path for path in there if path.exists()), plain)

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        if self.options.form != "official":
            account["expected"] = {}
        elif self.options.all and not self.options.limit:
            account["expected"] = ALL.get(split, {})
        return account

    def _official(self, split: str) -> list[str]:
        if not self.options.all:
            name = f"{split}_balanced_questions.json"
            return [self.first_there(f"questions1.2/{name}", name, f"questions/{name}")]
        if split == "train":
            folder = self.first_there("questions1.2/train_all_questions", "train_all_questions")
            # Not those that systems hide beside them in an archive.
            parts = sorted(path.name for path in (self.root / folder).glob("[!.]*.json"))
            return [f"{folder}/{part}" for part in parts] or [f"{folder}/train_all_questions_0.json"]
        name = f"{split}_all_questions.json"
        return [self.first_there(f"questions1.2/{name}", name)]


ENTRY = Gqa
