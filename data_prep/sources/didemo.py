"""DiDeMo: videos of Flickr with sentences about moments, for retrieval by paragraph.

{train,val,test}_data.json. A video can stand under two names that differ in their ending: it is one by the part before
the last dot, and its file may have any ending. `--form paragraph` joins all sentences of a video, in the file's order,
stripped, by one blank (how the published lists join them was not found); `--form sentences` keeps them apart.
`--form aurora` reads train.jsonl and test.jsonl with `caption` and `clip_name`. Source: specs/datasets.md 13.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.sources.common import annotations, captions
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.videos import VideoOptions, VideoSource, name_of


@dataclass
class Options(VideoOptions):
    """Options of the source.

    Attributes:
        form: one text of all sentences of a video (paragraph), the sentences apart, or Aurora's lists.
    """

    form: Literal["paragraph", "sentences", "aurora"] = "paragraph"


class DiDeMo(VideoSource):
    Options = Options
    title = "DiDeMo"
    origin = "github.com/LisaAnne/LocalizingMoments"
    layout = "{train,val,test}_data.json (also in data/), videos of any ending anywhere below"
    licence = "annotations BSD-2-Clause; videos under the terms of Flickr"
    expected = {"train": {"samples": 8_392}, "val": {"records": 4_180, "samples": 1_065}}
    expected |= {"test": {"records": 4_021, "samples": 1_004}}

    def files(self) -> dict[str, list[str]]:
        if self.options.form == "aurora":
            return {split: [f"{split}.jsonl"] for split in ("train", "test")}
        names = {split: f"{split}_data.json" for split in ("train", "val", "test")}
        return {split: [self.first_there(name, f"data/{name}")] for split, name in names.items()}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        file = self.root / self.files()[split][0]
        if self.options.form == "aurora":
            return index.parsed(split, annotations.json_lines(file), self._of_aurora)
        return index.parsed(split, annotations.items(file), self._entry)

    @staticmethod
    def _entry(row: Any) -> Entry:
        video = annotations.text(row["video"])
        stem = video.rpartition(".")[0] or video
        key = str(row["annotation_id"])
        item = {"text": captions.caption(row["description"], key).strip(), "times": row.get("times") or []}
        return Entry(stem, [stem], item, {"video_id": stem}, key=key)

    @staticmethod
    def _of_aurora(row: Any) -> Entry:
        name = name_of(annotations.text(row["clip_name"]))
        return Entry(name, [name], {"text": captions.caption(row["caption"], name)}, {"video_id": name})

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        texts = [item["text"] for item in items]
        captions = [" ".join(texts)] if self.options.form == "paragraph" else texts
        times = [item["times"] for item in items if "times" in item]
        return fields | {"captions": captions} | ({"moments": times} if times else {})

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        return account | ({"expected": {}} if self.options.form == "aurora" else {})


ENTRY = DiDeMo
