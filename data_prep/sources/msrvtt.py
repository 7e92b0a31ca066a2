"""MSR-VTT: 10,000 clips with some 20 captions each, for retrieval and captioning, and MSRVTT-QA.

`--form 7k`, `9k`  train by MSRVTT_train.7k.csv or MSRVTT_train.9k.csv, test by MSRVTT_JSFUSION_test.csv (1k-A): one
                   sentence a video, the csv's own. Without its list, 7k is train + val, 9k all that 1k-A leaves
`--form full`      train 6,513, val 497, test 2,990 by the clips' numbers; shares clips with 9k: never combine them
`--form qa`        {train,val,test}_qa.json, or {train,val,test}.jsonl of ClipBERT with its train_ans2label.json
`--form aurora`    train.jsonl and test.jsonl with `caption` and `clip_name`
Captions come from MSRVTT_data.json, {train_val,test}_videodatainfo.json or MSR_VTT.json. Videos videoN.mp4 lie
anywhere below the root. A sample is a clip. Source of the facts: specs/datasets.md 12.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations, captions, questions
from data_prep.sources.common.entry import Aside, Elsewhere, Entry, finding_split
from data_prep.sources.common.index import Index
from data_prep.sources.common.videos import VideoOptions, VideoSource, name_of

TEST_1K = "MSRVTT_JSFUSION_test.csv"
FROZEN = "MSR_VTT.json"
FULL = {"train": range(6513), "val": range(6513, 7010), "test": range(7010, 10000)}
VAL_QUESTIONS = {"texts": 12_278}  # of the other splits no source gives a number of the released files
ANSWERS = "train_ans2label.json"  # of ClipBERT: 1,500
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
        if form == "full":
            return {split: self._captions(split) for split in FULL}
        return {"train": [*self._captions(form), self._anywhere(TEST_1K)], "test": [self._anywhere(TEST_1K)]}

    def also_read(self) -> list[str]:
        lists = [self._anywhere(f"MSRVTT_train.{self.options.form}.csv")] if self.options.form in ("7k", "9k") else []
        qa = [*self.files()["train"], self._anywhere(ANSWERS)] if self.options.form == "qa" else []
        return lists + qa

    def begin(self, index: Index) -> None:
        """The videos of the training split and of all, or the answers of the training questions."""
        if self.options.form in ("7k", "9k"):
            self._train = self._names_of_training(index)
            self._all = self._train | self._column(self.root / self._anywhere(TEST_1K))
        if self.options.form == "full":
            self._all = {f"video{n}": None for numbers in FULL.values() for n in numbers}
        if self.options.form == "qa":
            index.keep(LISTED, self._answers(index, self.root / self.files()["train"][0]))

    def _answers(self, index: Index, train: Path) -> list[str]:
        """ClipBERT's list where it is there, else the answers of the training questions."""
        published = self.root / self._anywhere(ANSWERS)
        if train.suffix == ".jsonl" and published.is_file():
            return questions.check_listed(annotations.json_value(published), published)
        rows = annotations.records(train) if train.is_file() else ()
        return questions.given_answers(index, rows, lambda row: [row["answer"]], lambda row: row.get("id"))

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        files = [self.root / name for name in self.files()[split]]
        form = self.options.form
        if form == "qa":
            return index.parsed(split, annotations.records(files[0]), self._question)
        if form == "aurora":
            return index.parsed(split, annotations.json_lines(files[0]), self._of_aurora)
        if split == "test" and form != "full":
            return index.parsed(split, annotations.csv_rows(files[0], "video_id", "sentence"), self._of_csv)
        wanted = {f"video{n}": None for n in FULL[split]} if form == "full" else self._train
        return self._captioned(split, index, [file for file in files if file.name != TEST_1K], wanted)

    def _captioned(self, split: str, index: Index, files: list[Path], wanted: Collection[str]) -> Iterator[Entry]:
        """Captions of the wanted videos. Listed ones without any are noted, and once the captions of videos that
        belong to no split."""
        left, first = dict.fromkeys(wanted), split == self.chosen()[0]
        name = "image_id" if files[0].name == FROZEN else "video_id"

        for file in files:

            def entry(row: Any, of_half: str = f"{file.stem} " if len(files) > 1 else "") -> Entry:
                with finding_split(first):
                    video = _video(row[name])
                if video not in wanted and (video in self._all or not first):
                    raise Elsewhere
                if video not in wanted:
                    raise Aside("video in no split of this form", video)
                # Whether the numbers of sentences continue from half to half was not found.
                key = f"{of_half}{row['sen_id']}" if "sen_id" in row else None
                said = captions.caption(row["caption"], key or video)
                left.pop(video, None)
                return self._entry(video, said, key)

            key = "annotations" if file.name == FROZEN else "sentences"
            yield from index.parsed(split, annotations.items(file, key), entry)
        for video in left if self._listed().is_file() else ():
            index.without_text(split, video)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return fields | ({"questions": items} if self.options.form == "qa" else {"captions": items})

    def labels(self, split: str) -> list[str] | None:
        return self._of().kept(LISTED) or None

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        form = self.options.form
        numbers = {"7k": {"train": 7010, "test": 1000}, "9k": {"train": 9000, "test": 1000}}
        numbers["full"] = numbers["qa"] = {name: len(numbers) for name, numbers in FULL.items()}
        if not self.options.limit and (expected := numbers.get(form, {}).get(split)):
            account["expected"] = {"samples": expected} | (VAL_QUESTIONS if (form, split) == ("qa", "val") else {})
        return account

    @staticmethod
    def _entry(video: str, item: Any, key: str | None = None) -> Entry:
        return Entry(video, [video], item, {"video_id": video}, key=key)

    def _of_csv(self, row: dict[str, str]) -> Entry:
        video = _video(row["video_id"])
        return self._entry(video, captions.caption(row["sentence"], video), key=video)

    def _of_aurora(self, row: Any) -> Entry:
        video = name_of(annotations.text(row["clip_name"]))
        return self._entry(video, captions.caption(row["caption"], video))

    def _question(self, row: Any) -> Entry:
        video = _video(row["video_id"])
        answers = questions.answered([row["answer"]], str(row.get("id", video)))
        item = {"question": annotations.text(row["question"]), "answers": answers}
        if "id" in row:
            item["question_id"] = annotations.identifier(row["id"])
        item |= questions.types_of(row, type="answer_type")
        return self._entry(video, item, str(row["id"]) if "id" in row else None)

    def _names_of_training(self, index: Index) -> dict[str, None]:
        if self._listed().is_file():
            return self._column(self._listed(), index if "train" in self.chosen() else None)
        tested = self._column(self.root / self._anywhere(TEST_1K))
        numbers = range(7010) if self.options.form == "7k" else range(10000)
        return {name: None for n in numbers if (name := f"video{n}") not in tested}

    @staticmethod
    def _column(file: Path, index: Index | None = None) -> dict[str, None]:
        """Videos that a csv file lists, in its order; with `index`, those that stand again are set aside there."""
        names: dict[str, None] = {}
        for name in (_video(row["video_id"]) for row in annotations.csv_rows(file, "video_id") if row["video_id"]):
            if name in names and index is not None:
                index.set_aside("train", captions.LISTED_BEFORE, name)
            names[name] = None
        return names

    def _listed(self) -> Path:
        """The list of training videos of 7k or 9k, which need not be there."""
        return self.root / self._anywhere(f"MSRVTT_train.{self.options.form}.csv")

    def _captions(self, part: str) -> list[str]:
        """Files with the captions of a split of `full`, or of the training videos of 7k or 9k."""
        one = self._anywhere("MSRVTT_data.json", FROZEN)
        if (self.root / one).exists():
            return [one]
        halves = {"test": ["test"], "9k": ["train_val", "test"]}.get(part, ["train_val"])
        files = [self._anywhere(f"{half}_videodatainfo.json") for half in halves]
        return files if any((self.root / file).exists() for file in files) else [one]

    def _anywhere(self, *names: str) -> str:
        folders = ("", "annotation/", "annotations/", "msrvtt_data/", "high-quality/structured-symlinks/", "MSRVTT/")
        return self.first_there(*(folder + name for name in names for folder in folders))


def _video(value: Any) -> str:
    """Name of a video, `video7` of 7 and "7" too. Raises ValueError for anything else than a number or a text."""
    name = str(annotations.identifier(value)).strip()
    return f"video{name}" if name.isdigit() else name


ENTRY = MsrVtt
