"""MSVD-QA: questions with one-word answers about YouTube clips.

{train,val,test}_qa.json with youtube_mapping.txt (`<clip name> vidN` a line); clips lie as YouTubeClips/<name>.avi,
whose names begin with any character. Source of the facts: specs/datasets.md 14.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.sources.common import annotations, questions
from data_prep.sources.common.entry import Aside, Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.videos import VideoOptions, VideoSource

MAPPING = "youtube_mapping.txt"
LISTED, CLIPS = "listed", "clips"


class MsvdQa(VideoSource):
    Options = VideoOptions
    title = "MSVD-QA"
    origin = "github.com/xudejing/video-question-answering (questions), Microsoft Research (clips)"
    layout = "{train,val,test}_qa.json, youtube_mapping.txt, YouTubeClips/*.avi"
    licence = "for research"
    expected = {
        "train": {"texts": 30_933, "samples": 1_161},
        "val": {"texts": 6_415, "samples": 245},
        "test": {"texts": 13_157, "samples": 504},
    }

    def files(self) -> dict[str, list[str]]:
        return {split: [f"{split}_qa.json", MAPPING] for split in ("train", "val", "test")}

    def also_read(self) -> list[str]:
        return ["train_qa.json"]

    def begin(self, index: Index) -> None:
        """Clips by their number, and the answers of the training questions, the most frequent first."""
        split, lines = self.chosen()[0], annotations.lines(self.root / MAPPING)
        index.put_once(CLIPS, split, lines, _clip, f"line of {MAPPING}", "video named before")
        train = self.root / "train_qa.json"
        rows = annotations.items(train) if train.is_file() else ()
        index.keep(LISTED, questions.given_answers(index, rows, lambda row: [row["answer"]], lambda row: row["id"]))

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        def entry(row: Any) -> Entry:
            number = str(annotations.identifier(row["video_id"]))
            number = f"vid{number}" if number.isdigit() else number
            clip = index.get(CLIPS, number)
            if clip is None:
                raise Aside(f"video that {MAPPING} does not name", number)
            answers = questions.answered([row["answer"]], str(row["id"]))
            item = {"question": annotations.text(row["question"]), "answers": answers}
            item["question_id"] = annotations.identifier(row["id"])
            return Entry(clip, [clip], item, {"video_id": number}, key=str(row["id"]))

        return index.parsed(split, annotations.items(self.root / self.files()[split][0]), entry)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return fields | {"questions": items}

    def labels(self, split: str) -> list[str] | None:
        return self._of().kept(LISTED) or None


def _clip(line: str) -> list[tuple[str, str]]:
    """(number, name) of a line `<clip name> vidN`. Raises ValueError for another."""
    name, number = line.rsplit(maxsplit=1)
    return [(number, name)]


ENTRY = MsvdQa
