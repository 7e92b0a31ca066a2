"""VQAv2: the official files, Karpathy's split by picture, LXMERT's and VL-T5's files, or BLIP's.

`--form official`  v2_OpenEnded_mscoco_*_questions.json and v2_mscoco_*_annotations.json: train, val, test, test_dev
`--form karpathy`  the same files with dataset_coco.json: a question goes where its picture is; restval trains
`--form lxmert`    train.json, valid.json, nominival.json, minival.json, test.json, with trainval_label2ans.json or
                   trainval_ans2label.json where one is there
`--form vlt5`      karpathy_train.json, karpathy_val.json, karpathy_test.json, rows as LXMERT's
`--form blip`      vqa_train.json, vqa_val.json, vqa_test.json, with answer_list.json where it is there
Pictures lie in train2014/, val2014/ and test2015/ (test_dev has none of its own). A sample is a picture with all its
questions. The list of answers is made by the published rule from train and val: 3,129 entries. Test has no answers.
Source of the facts: specs/datasets.md 2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations, captions, coco, questions
from data_prep.sources.common.entry import Aside, Elsewhere, Entry, finding_split
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions
from mmpeft_ds.errors import BadInput

SUBTYPES = {"train": "train2014", "val": "val2014", "test": "test2015", "test_dev": "test-dev2015"}
ANSWERED = ("train", "val")
LXMERT = ("train", "valid", "nominival", "minival", "test")  # `valid` in Routing's configurations
LISTED = "listed"
VG_WEIGHT = 0.2  # of a question with the answer of one person, in BLIP's and ALBEF's training


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        form: whose files are read: the publishers' (official), these split by picture (karpathy), LXMERT's (lxmert),
            VL-T5's and VL-Adapter's (vlt5), or BLIP's (blip).
        min_answer_count: an answer is listed if it is the main answer, normalised, of at least so many questions.
        targets: soft targets count the annotators' answers as they were written (official, as published), or
            normalised.
        vg_weight: weight in the loss of Visual Genome's questions in BLIP's files (where it is not given, BLIP's 0.2;
            LAVIS has 1).
    """

    form: Literal["official", "karpathy", "lxmert", "vlt5", "blip"] = "official"
    min_answer_count: int = 9
    targets: Literal["official", "normalised"] = "official"
    vg_weight: float | None = None


class VqaV2(coco.CocoSource):
    Options = Options
    title = "VQAv2"
    origin = (
        "visualqa.org/download and cocodataset.org; the split file of Karpathy's captions; LXMERT's or BLIP's files"
    )
    layout = (
        "v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json, v2_mscoco_{train2014,val2014}"
        "_annotations.json (also in Questions/, Annotations/ or vqa/), train2014/*.jpg, val2014/*.jpg, test2015/*.jpg"
    )
    licence = "CC-BY-4.0; pictures under the terms of Flickr"
    expected = {
        "train": {"pictures": 82_783, "texts": 443_757},
        "val": {"pictures": 40_504, "texts": 214_354},
        "test": {"pictures": 81_434, "texts": 447_793},
        "test_dev": {"pictures": 36_807, "texts": 107_394},
    }

    def __init__(self, options: Options):
        super().__init__(options)
        if options.min_answer_count < 1:
            raise BadInput(
                f"--min-answer-count: {options.min_answer_count}. Use 1 or more; 9 gives the published list."
            )
        self._vg_weight = VG_WEIGHT if options.vg_weight is None else options.vg_weight
        if not 0 <= self._vg_weight < math.inf:
            raise BadInput(f"--vg-weight: {options.vg_weight}. Use 0 or more; BLIP has 0.2, LAVIS 1.")

    def files(self) -> dict[str, list[str]]:
        form = self.options.form
        if form == "official":
            return {
                split: [self._questions(split), *([self._annotations(split)] if split in ANSWERED else [])]
                for split in SUBTYPES
            }
        if form == "karpathy":
            both = [name for split in ANSWERED for name in (self._questions(split), self._annotations(split))]
            return {split: [self.first_there(*captions.COCO_KARPATHY), *both] for split in captions.SPLITS}
        if form == "lxmert":
            return {split: [self.first_there(f"{split}.json", f"vqa/{split}.json")] for split in LXMERT}
        if form == "vlt5":
            return {s: [self.first_there(f"karpathy_{s}.json", f"vqa/karpathy_{s}.json")] for s in captions.SPLITS}
        return {s: [self.first_there(f"vqa_{s}.json", f"annotations/vqa_{s}.json")] for s in captions.SPLITS}

    def also_read(self) -> list[str]:
        return [self._published_list(), *(self._annotations(split) for split in ANSWERED)]

    def begin(self, index: Index) -> None:
        """The annotations of train and val, where they are there, and the list of answers."""
        there = [self.root / self._annotations(split) for split in ANSWERED]
        there = [file for file in there if file.is_file()]
        if self.options.form != "blip":
            for half in ANSWERED:
                if (file := self.root / self._annotations(half)) in there:
                    questions.put_answers(index, file, *self._kept_as(half))
        index.keep(LISTED, self._list(there, index))
        if self.options.form == "karpathy":
            images = annotations.items(self.root / self.first_there(*captions.COCO_KARPATHY), "images")
            parse, repeated = captions.karpathy_split, captions.LISTED_BEFORE
            index.put_once("split", self.chosen()[0], images, parse, "image", repeated)

    def _kept_as(self, half: str) -> tuple[str, str]:
        """What an annotation file is called in the index, and the split whose report names what is wrong in it."""
        if self.options.form == "official":
            return half, half if half in self.chosen() else ""
        return (half, self.chosen()[0]) if self.options.form == "karpathy" else (questions.BOTH, "")

    def _published_list(self) -> str:
        blip = self.options.form == "blip"
        names = ("answer_list.json",) if blip else ("trainval_label2ans.json", "trainval_ans2label.json")
        return self.first_there(*(f"{folder}{name}" for name in names for folder in ("", "vqa/", "annotations/")))

    def _list(self, files: list[Path], index: Index) -> list[str]:
        published = self.root / self._published_list()
        if self.options.form in ("lxmert", "vlt5", "blip") and published.is_file():
            return questions.check_listed(annotations.json_value(published), published)
        if len(files) == 1:
            made_of = files[0].relative_to(self.root)
            print(
                f"note: the list of answers is made of {made_of} alone; the published one takes train and val",
                file=sys.stderr,
            )
        return questions.answer_list(index, files, self.options.min_answer_count)

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        names = self.files()[split]
        form = self.options.form
        if form in ("lxmert", "vlt5"):
            answered = (form, split) != ("lxmert", "test")  # VL-T5's test is a part of val2014
            return questions.scored(annotations.items(self.root / names[0]), split, index, self._by_name, answered)
        if form == "blip":
            return self._of_blip(self.root / names[0], split, index)
        self._listed = set(index.kept(LISTED))
        if form == "official":
            return self._official(split, split, index, lambda row: self._path(SUBTYPES[split], row["image_id"]))
        return self._of_karpathy(split, index)

    def _official(self, file_of: str, split: str, index: Index, path: Any) -> Iterator[Entry]:
        file = self.root / self._questions(file_of)
        answered, rule = file_of in ANSWERED, self.options.targets
        first = self.options.form == "official" or split == self.chosen()[0]
        return questions.official(file, file_of, split, index, path, self._listed, rule, answered, first)

    def _of_karpathy(self, split: str, index: Index) -> Iterator[Entry]:
        first = split == self.chosen()[0]  # it tells what belongs to no split
        for half in ANSWERED:

            def path(row: Any, half: str = half) -> str:
                with finding_split(first):
                    actual = index.get("split", str(row["image_id"]))
                if actual is None and first:
                    raise Aside("picture in no split of Karpathy's file", str(row["question_id"]))
                if actual != split:
                    raise Elsewhere
                return self._path(SUBTYPES[half], row["image_id"])

            yield from self._official(half, split, index, path)

    def _of_blip(self, file: Path, split: str, index: Index) -> Iterator[Entry]:
        def entry(row: Any) -> Entry:
            answers = row.get("answer", []) if split == "test" else row["answer"]
            answers = answers if isinstance(answers, list) else [answers]
            item: dict[str, Any] = {"question": annotations.text(row["question"])}
            key = None
            if "question_id" in row:
                item["question_id"] = annotations.identifier(row["question_id"])
                key = f"{row.get('dataset', 'vqa')} {row['question_id']}"
            if isinstance(row.get("dataset"), str):
                item["dataset"] = row["dataset"]  # vqa, or vg for Visual Genome's
            if row.get("dataset") == "vg":
                item["weight"] = self._vg_weight
            name = annotations.text(row["image"])
            known = split != "test" or answers
            item["answers"] = questions.answered(answers, key or name) if known else []
            return Entry(name, [name], item, {}, key=key)

        return index.parsed(split, annotations.items(file), entry)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return questions.record(items, fields)

    def labels(self, split: str) -> list[str] | None:
        return self._of().kept(LISTED) or None

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        if self.options.form != "official":
            account["expected"] = {}
        if (self.options.form, split) == ("lxmert", "minival") and not self.options.limit:
            account["expected"] = {"texts": 25_994}
        return account

    def _questions(self, split: str) -> str:
        name = f"v2_OpenEnded_mscoco_{SUBTYPES[split]}_questions.json"
        return self.first_there(name, f"Questions/{name}", f"vqa/{name}")

    def _annotations(self, split: str) -> str:
        name = f"v2_mscoco_{SUBTYPES[split]}_annotations.json"
        return self.first_there(name, f"Annotations/{name}", f"vqa/{name}")

    @staticmethod
    def _path(subtype: str, number: Any) -> str:
        return coco.picture("test2015" if subtype == "test-dev2015" else subtype, number)

    @staticmethod
    def _by_name(image: str) -> str:
        """Path of LXMERT's `COCO_train2014_000000458752`."""
        return f"{annotations.text(image).split('_')[1]}/{image}.jpg"


ENTRY = VqaV2
