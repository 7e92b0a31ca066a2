"""The eleven few-shot data sets of CoOp by name, or any folder of images with a split file of their kind.

    prepare.py coop-split --root DATA --dataset oxford_pets --out OUT
    prepare.py coop-split --root FOLDER --splits-file split_zhou_Mine.json --out OUT

A split file holds {"train": [[path, label, class name], ...], "val": ..., "test": [...]}. Samples stay in its order,
so that data_prep/few_shot.py draws the shots that CoOp draws, and labels are its numbers, which follow folders and not
class names. FGVC Aircraft comes with lists of variants, ImageNet with folders (its val serves as val and test).
Source of the facts: CoOp, arXiv 2109.01134; specs/datasets.md 15.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_prep.sources.common import annotations, imagenet
from data_prep.sources.common.entry import Aside, Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource
from mmpeft_ds.errors import BadInput

SPLITS = ("train", "val", "test")


class Known(NamedTuple):
    """A data set of CoOp's: its folder, folder of pictures in it, split file, prompt, and samples of each split."""

    folder: str
    pictures: str
    file: str
    template: str
    counts: tuple[int, int, int] | None


DATASETS = {
    "caltech101": Known("caltech-101", "101_ObjectCategories", "Caltech101", "a photo of a {}.", (4128, 1649, 2465)),
    "oxford_pets": Known("oxford_pets", "images", "OxfordPets", "a photo of a {}, a type of pet.", (2944, 736, 3669)),
    "stanford_cars": Known("stanford_cars", "", "StanfordCars", "a photo of a {}.", (6509, 1635, 8041)),
    "oxford_flowers": Known(
        "oxford_flowers", "jpg", "OxfordFlowers", "a photo of a {}, a type of flower.", (4093, 1633, 2463)
    ),
    "food101": Known("food-101", "images", "Food101", "a photo of {}, a type of food.", (50500, 20200, 30300)),
    "fgvc_aircraft": Known("fgvc_aircraft", "images", "", "a photo of a {}, a type of aircraft.", None),
    "sun397": Known("sun397", "SUN397", "SUN397", "a photo of a {}.", (15880, 3970, 19850)),
    "dtd": Known("dtd", "images", "DescribableTextures", "{} texture.", (2820, 1128, 1692)),
    "eurosat": Known("eurosat", "2750", "EuroSAT", "a centered satellite photo of {}.", (13500, 5400, 8100)),
    "ucf101": Known("ucf101", "UCF-101-midframes", "UCF101", "a photo of a person doing {}.", (7639, 1898, 3783)),
    "imagenet": Known("imagenet", "images", "", "a photo of a {}.", None),
}


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        dataset: one of CoOp's by name: its folder below the root, picture folder and split file are then known.
        splits_file: a split file of CoOp's form; its paths are relative to the root.
    """

    dataset: Literal[tuple(DATASETS)] | None = None  # type: ignore[valid-type]
    splits_file: Path | None = None


class CoopSplit(LayoutSource):
    Options = Options
    title = "this data set of CoOp's"
    origin = "the addresses in CoOp's DATASETS.md"
    licence = "unknown"

    def __init__(self, options: Options):
        if (options.dataset is None) == (options.splits_file is None):
            raise BadInput(
                "coop-split: give --dataset NAME with the folder above, or --splits-file FILE; one of them."
            )
        self.known = DATASETS.get(options.dataset or "")
        if self.known is not None:
            options = self._located(options, self.known)
        super().__init__(options)
        if options.splits_file is not None and not options.splits_file.is_file():
            raise BadInput(f"--splits-file {options.splits_file}: no such file.")

    @staticmethod
    def _located(options: Options, known: Known) -> Options:
        """Options with the root of the data set itself, and its folder of pictures."""
        root = options.root / known.folder if (options.root / known.folder).is_dir() else options.root
        above = options.pictures or root
        places = (above / known.folder / known.pictures, above / known.pictures, above / "data" / known.pictures)
        return replace(options, root=root, pictures=next((place for place in places if place.is_dir()), above))

    @property
    def layout(self) -> str:
        """Expected layout of the folder."""
        if self.known is None:
            return "the pictures that the split file names"
        file = f"split_zhou_{self.known.file}.json" if self.known.file else self._own_files("train")[0]
        return f"{self.known.folder}/{file}, {self.known.folder}/{self.known.pictures or '<folders>'}/..."

    def files(self) -> dict[str, list[str]]:
        if self.options.splits_file is not None:
            return {split: [str(self.options.splits_file.absolute())] for split in self._items}
        if self.known.file:
            return {split: [f"split_zhou_{self.known.file}.json"] for split in SPLITS}
        return {split: self._own_files(split) for split in SPLITS}

    def _own_files(self, split: str) -> list[str]:
        """Files of the two data sets that CoOp reads in their original form."""
        if self.options.dataset == "imagenet":
            return ["classnames.txt", str((self.pictures_root / self._folder(split)).absolute())]
        return [self.first_there(f"images_variant_{split}.txt", f"data/images_variant_{split}.txt"), self._variants()]

    @staticmethod
    def _folder(split: str) -> str:
        """The folder of ImageNet's class folders; val serves as val and test."""
        return "train" if split == "train" else "val"

    def _variants(self) -> str:
        return self.first_there("variants.txt", "data/variants.txt")

    def begin(self, index: Index) -> None:
        """The classes, which must not contradict each other."""
        index.keep("names", self._class_names())

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        names = index.kept("names")
        if self.options.dataset == "imagenet":
            classes = imagenet.classes(self.root / "classnames.txt")
            labels = {wnid: i for i, (wnid, _) in enumerate(classes)}
            return imagenet.entries(self.pictures_root, self._folder(split), split, index, labels, names)
        if self.options.dataset == "fgvc_aircraft":
            lines = annotations.lines(self.root / self._own_files(split)[0])
            numbers = {name: i for i, name in enumerate(names)}
            return index.parsed(split, lines, lambda line: self._of_variant(line, numbers))
        return (self._entry(*item) for item in self._items.get(split, []))

    def _entry(self, path: str, label: int, name: str) -> Entry:
        return Entry(path, [path], None, {"label": label, "class_name": name}, key=path)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return fields

    def labels(self, split: str) -> list[str]:
        """Class names by CoOp's class index."""
        return self._of().kept("names")

    def fingerprint(self) -> dict[str, str]:
        prints = super().fingerprint()
        return {Path(name).name: value for name, value in prints.items()}

    def account(self, split: str) -> dict[str, Any]:
        account = super().account(split)
        if self.known is not None:
            account["template"] = self.known.template
            if self.known.counts and not self.options.limit:
                account["expected"] = {"samples": self.known.counts[SPLITS.index(split)]}
        return account

    def _split_file(self) -> Path:
        return self.root / f"split_zhou_{self.known.file}.json" if self.known else self.options.splits_file

    def _class_names(self) -> list[str]:
        if self.options.dataset == "imagenet":
            return imagenet.names(imagenet.classes(self.root / "classnames.txt"))
        if self.options.dataset == "fgvc_aircraft":
            file = self.root / self._variants()
            names = [line.strip() for line in annotations.lines(file)]
            if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
                raise BadInput(f"{file}: {twice!r} stands twice, and labels go by its lines. Download it again.")
            return names
        file = self._split_file()
        names: dict[int, str] = {}
        for items in self._items.values():
            for _, label, name in items:
                if names.setdefault(label, name) != name:
                    raise BadInput(f"{file}: class {label} is {names[label]!r} and {name!r}.")
        if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
            raise BadInput(f"{file}: its class numbers have gaps, or two have the same name.")
        return [names[i] for i in range(len(names))]

    def _of_variant(self, line: str, numbers: dict[str, int]) -> Entry:
        """`0034309 707-320` a line: a number and a variant, which may hold blanks and slashes."""
        image, _, variant = line.partition(" ")
        if variant.strip() not in numbers:
            raise Aside("variant that variants.txt does not name", line[:60])
        return self._entry(f"{image}.jpg", numbers[variant.strip()], variant.strip())

    @cached_property
    def _items(self) -> dict[str, list[tuple[str, int, str]]]:
        """Split -> (path, class index, class name) in the file's order."""
        file = self._split_file()
        try:
            raw = self._read(file)
            items = {split: [self._item(entry) for entry in raw[split]] for split in SPLITS if raw.get(split)}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _no_split_file(file, error) from error
        if not items:
            raise BadInput(f"{file}: holds none of the splits {', '.join(SPLITS)}.")
        return items

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        raw = annotations.json_value(file)
        if not isinstance(raw, dict):
            raise _no_split_file(file, "no object")
        return raw

    @staticmethod
    def _item(entry: Any) -> tuple[str, int, str]:
        path, label, name = entry
        label = int(label) if isinstance(label, str | float) and int(label) == float(label) else label
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f"entry {str(entry)[:60]}")
        return annotations.text(path), label, annotations.text(name)


def _no_split_file(file: Path, error: object) -> BadInput:
    expected = "{'train': [[path, label, class name], ...]}"
    return BadInput(f"{file}: no split file of CoOp ({error}); expected {expected}.")


ENTRY = CoopSplit
