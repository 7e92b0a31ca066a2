"""ImageNet, and the four test sets made for its classes: V2, Sketch, A (adversarial) and R (renditions).

    prepare.py imagenet --root imagenet --out OUT                 images/train and images/val by class folder
    prepare.py imagenet --root imagenetv2 --form v2 --out OUT     one folder a label, 0 to 999, read as numbers

Each wants classnames.txt (`n01440764 tench` a line), whose folders in order are the labels; the test sets have a copy
of it in their folder, or take `--classnames FILE`. A and R have 200 of the classes: their labels are these, by folder.
Source of the facts: specs/datasets.md 15.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import imagenet
from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource
from mmpeft_ds.errors import BadInput

# Form -> where its class folders lie below the root, and how many pictures are in use.
TEST_SETS = {
    "v2": ("imagenetv2-matched-frequency-format-val", 10_000),
    "sketch": ("images", 50_889),
    "adversarial": ("imagenet-a", 7_500),
    "rendition": ("imagenet-r", 30_000),
}


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        form: ImageNet itself, or which of the test sets made for its classes.
        classnames: CoOp's classnames.txt, where the root holds no copy of it.
    """

    form: Literal["official", "v2", "sketch", "adversarial", "rendition"] = "official"
    classnames: Path | None = None


class ImageNet(LayoutSource):
    Options = Options
    title = "ImageNet"
    origin = "image-net.org, or the page of the test set; classnames.txt from CoOp's DATASETS.md"
    layout = "classnames.txt, images/train/n*/*.JPEG, images/val/n*/*.JPEG; of a test set its folder of class folders"
    licence = "for research, under ImageNet's terms"

    def files(self) -> dict[str, list[str]]:
        names = str(self.options.classnames.absolute()) if self.options.classnames else "classnames.txt"
        if self.options.form == "official":
            return {split: [names, self.below_root(self._folder(split))] for split in ("train", "val")}
        return {"test": [names, self.below_root(self._folder("test"))]}

    def _folder(self, split: str) -> str:
        """The folder that holds the class folders of a split."""
        if self.options.form == "official":
            return self.pictures_there(f"images/{split}", split)
        return self.pictures_there(TEST_SETS[self.options.form][0], ".")

    def begin(self, index: Index) -> None:
        """The classes that the form has."""
        classes = imagenet.classes(self.root / self._classnames())
        names = imagenet.names(classes)
        if self.options.form in ("adversarial", "rendition"):
            place = self.pictures_root / self._folder("test")
            there = [i for i, (folder, _) in enumerate(classes) if (place / folder).is_dir()]
            classes, names = [classes[i] for i in there], [names[i] for i in there]
        if not names:
            raise BadInput(f"{self.root}: none of the classes has a folder. {self._advice()}")
        index.keep("names", names)
        index.keep("folders", [folder for folder, _ in classes])

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        names, folders = index.kept("names"), index.kept("folders")
        if self.options.form == "v2":
            folders = [str(i) for i in range(len(folders))]
        folder = self._folder(split)
        labels = {name: label for label, name in enumerate(folders)}
        return imagenet.entries(self.pictures_root, "" if folder == "." else folder, split, index, labels, names)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return fields

    def labels(self, split: str) -> list[str]:
        return self._of().kept("names")

    def fingerprint(self) -> dict[str, str]:
        return {Path(name).name: value for name, value in super().fingerprint().items()}

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        if self.options.form in TEST_SETS and not self.options.limit:
            account["expected"] = {"samples": TEST_SETS[self.options.form][1]}
        return account

    def _classnames(self) -> str:
        return next(iter(self.files().values()))[0]


ENTRY = ImageNet
