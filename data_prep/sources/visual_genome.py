"""Visual Genome: region descriptions as captions, or its questions, all as `train` (it has no official splits).

`--form regions`    region_descriptions.json: `captions` with `boxes` (x, y, width, height in pixels) beside them
`--form questions`  question_answers.json: `questions` with one answer each, which end in a period as they come
Pictures lie in VG_100K/ and VG_100K_2/; each is looked for in both. Source of the facts: specs/datasets.md 17.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations, captions, questions
from data_prep.sources.common.entry import Aside, Elsewhere, Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

FILES = {"regions": "region_descriptions.json", "questions": "question_answers.json"}
PARTS = {"regions": "regions", "questions": "qas"}  # key of the list of a picture
FOLDERS = ("VG_100K", "VG_100K_2")


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        form: region descriptions, or questions.
    """

    form: Literal["regions", "questions"] = "regions"


class VisualGenome(LayoutSource):
    Options = Options
    title = "Visual Genome"
    origin = "homes.cs.washington.edu/~ranjay/visualgenome"
    layout = "region_descriptions.json or question_answers.json, VG_100K/*.jpg, VG_100K_2/*.jpg"
    licence = "CC-BY-4.0"

    def files(self) -> dict[str, list[str]]:
        return {"train": [FILES[self.options.form]]}

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        key = PARTS[self.options.form]
        parse = self._region if key == "regions" else self._question
        images = annotations.items(self.root / FILES[self.options.form])

        def entry(pair: tuple[Any, Any]) -> Entry:
            image, part = pair
            if image[key] == []:
                index.without_text(split, f"{image['id']}.jpg")  # the files list such pictures too
                raise Elsewhere
            # Copies of the files differ in whether a part names its picture too.
            return parse({"image_id": image["id"]} | part if "id" in image else part)

        return index.parsed(split, annotations.nested(images, key), entry)

    @staticmethod
    def _region(region: Any) -> Entry:
        number, key = annotations.identifier(region["image_id"]), str(region["region_id"])
        box = [region[side] for side in ("x", "y", "width", "height")]
        if not all(isinstance(side, int | float) for side in box):
            raise Aside("box of other things than numbers", key)
        item = {"caption": captions.caption(region["phrase"], key), "box": box}
        return Entry(f"{number}.jpg", [f"{number}.jpg"], item, {"image_id": number}, key=key)

    @staticmethod
    def _question(asked: Any) -> Entry:
        number = annotations.identifier(asked["image_id"])
        item = {"question": annotations.text(asked["question"]), "question_id": annotations.identifier(asked["qa_id"])}
        item["answers"] = questions.answered([asked["answer"]], str(asked["qa_id"]))
        return Entry(f"{number}.jpg", [f"{number}.jpg"], item, {"image_id": number}, key=str(asked["qa_id"]))

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        if self.options.form == "questions":
            return fields | {"questions": items}
        return fields | {"captions": [i["caption"] for i in items], "boxes": [i["box"] for i in items]}

    def locate(self, name: str) -> Path:
        there = (self.pictures_root / folder / name for folder in (*FOLDERS, "VG/VG_100K", "VG/VG_100K_2"))
        return next((path for path in there if path.exists()), self.pictures_root / FOLDERS[0] / name)


ENTRY = VisualGenome
