"""MSR-VTT: 10,000 clips with some 20 captions each, for retrieval and captioning, and MSRVTT-QA.

`--form 7k`, `9k`  train by MSRVTT_train.7k.csv or MSRVTT_train.9k.csv, test by MSRVTT_JSFUSION_test.csv (1k-A): one
                   sentence a video, the csv's own. Without its list, 7k is train + val, 9k all that 1k-A leaves
`--form full`      train 6,513, val 497, test 2,990 by the clips' numbers; shares clips with 9k: never combine them
`--form qa`        {train,val,test}_qa.json, or {train,val,test}.jsonl of ClipBERT
`--form aurora`    train.jsonl and test.jsonl with `caption` and `clip_name`
Captions come from MSRVTT_data.json, {train_val,test}_videodatainfo.json or MSR_VTT.json. Videos videoN.mp4 lie
anywhere below the root. A sample is a clip. Source of the facts: specs/datasets.md 12.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations, questions
from data_prep.sources.common.index import Elsewhere, Entry, Index
from data_prep.sources.common.videos import VideoOptions, VideoSource

TEST_1K = "MSRVTT_JSFUSION_test.csv"
FULL = {"train": range(6513), "val": range(6513, 7010), "test": range(7010, 10000)}
LISTED = "listed"


@dataclass
class Options(VideoOptions):
    """Options of the source.

    Attributes:
        form: which split, or the questions, see above.
    """

    form: Literal["7k", "9k", "full", "qa", "aurora"] = "9k"


class MsrVtt(VideoSource):
    Options = Options
    title = "MSR-VTT"
    origin = "Microsoft Research, or the archive of Frozen in Time; the lists of 1k-A from CLIP4Clip"
    layout = "videos/all/video*.mp4 (or anywhere below), MSRVTT_data.json, MSRVTT_JSFUSION_test.csv, {split}_qa.json"
    licence = "for research"

    def files(self) -> dict[str, list[str]]:
        form = self.options.form
        if form == "qa":
            return {s: [self._anywhere(f"{s}_qa.json", f"{s}.jsonl")] for s in ("train", "val", "test")}
        if form == "aurora":
            return {s: [self._anywhere(f"{s}.jsonl")] for s in ("train", "test")}
        captions = self._captions()
        if form == "full":
            return {split: captions for split in FULL}
        return {"train": [*captions, self._anywhere(TEST_1K)], "test": [self._anywhere(TEST_1K)]}

    def also_read(self) -> list[str]:
        lists = [self._anywhere(f"MSRVTT_train.{self.options.form}.csv")] if self.options.form in ("7k", "9k") else []
        return lists + (self.files()["train"] if self.options.form == "qa" else [])

    def begin(self, index: Index) -> None:
        """The videos of the training split, or the answers of the training questions."""
        if self.options.form in ("7k", "9k"):
            self._train = self._names_of_training()
        if self.options.form == "qa":
            file = self.root / self.files()["train"][0]
            rows = annotations.records(file) if file.is_file() else ()
            index.keep(LISTED, questions.most_frequent(Counter(str(row.get("answer")) for row in rows)))

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        files = [self.root / name for name in self.files()[split]]
        form = self.options.form
        if form == "qa":
            return index.parsed(split, annotations.records(files[0]), self._question)
        if form == "aurora":
            return index.parsed(split, annotations.json_lines(files[0]), self._of_aurora)
        if split == "test" and form != "full":
            return index.parsed(split, self._rows(files[0]), self._of_csv)
        wanted = {f"video{n}" for n in FULL[split]} if form == "full" else self._train

        def entry(row: tuple[str, Any]) -> Entry:
            key, sentence = row
            if sentence[key] not in wanted:
                raise Elsewhere
            return self._entry(sentence[key], annotations.text(sentence["caption"]))

        return index.parsed(split, self._sentences(files[: len(self._captions())]), entry)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return fields | ({"questions": items} if self.options.form == "qa" else {"captions": items})

    def labels(self, split: str) -> list[str] | None:
        return self._of().kept(LISTED) or None

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        numbers = {"7k": {"train": 7010, "test": 1000}, "9k": {"train": 9000, "test": 1000}}
        numbers["full"] = numbers["qa"] = {name: len(numbers) for name, numbers in FULL.items()}
        if not self.options.limit and (expected := numbers.get(self.options.form, {}).get(split)):
            account["expected"] = {"samples": expected}
        return account

    @staticmethod
    def _entry(video: str, item: Any, key: str | None = None) -> Entry:
        return Entry(video, [video], item, {"video_id": video}, key=key)

    def _of_csv(self, row: dict[str, str]) -> Entry:
        return self._entry(row["video_id"], annotations.text(row["sentence"]))

    def _of_aurora(self, row: Any) -> Entry:
        return self._entry(Path(annotations.text(row["clip_name"])).stem, annotations.text(row["caption"]))

    def _question(self, row: Any) -> Entry:
        video = row["video_id"] if isinstance(row["video_id"], str) else f"video{row['video_id']}"
        item = {"question": annotations.text(row["question"]), "answers": [annotations.text(row["answer"])]}
        if "id" in row:
            item["question_id"] = row["id"]
        if "answer_type" in row:
            item["type"] = row["answer_type"]
        return self._entry(video, item, str(row["id"]) if "id" in row else None)

    def _sentences(self, files: list[Path]) -> Iterator[tuple[str, Any]]:
        """(key of the video's name, row) of the files of captions, in their order."""
        for file in files:
            if file.name == "MSR_VTT.json":
                yield from (("image_id", row) for row in annotations.items(file, "annotations"))
            else:
                yield from (("video_id", row) for row in annotations.items(file, "sentences"))

    @staticmethod
    def _rows(file: Path) -> Iterator[dict[str, str]]:
        return csv.DictReader(annotations.lines(file))

    def _names_of_training(self) -> set[str]:
        listed = self.root / self._anywhere(f"MSRVTT_train.{self.options.form}.csv")
        if listed.is_file():
            return {row["video_id"] for row in self._rows(listed)}
        tested = {row["video_id"] for row in self._rows(self.root / self._anywhere(TEST_1K))}
        numbers = range(7010) if self.options.form == "7k" else range(10000)
        return {f"video{n}" for n in numbers} - tested

    def _captions(self) -> list[str]:
        one = self._anywhere("MSRVTT_data.json", "MSR_VTT.json")
        if (self.root / one).exists():
            return [one]
        both = [self._anywhere(f"{half}_videodatainfo.json") for half in ("train_val", "test")]
        return both if (self.root / both[0]).exists() else [one]

    def _anywhere(self, *names: str) -> str:
        folders = ("", "annotation/", "annotations/", "msrvtt_data/", "high-quality/structured-symlinks/", "MSRVTT/")
        return self.first_there(*(folder + name for name in names for folder in folders))


ENTRY = MsrVtt
