"""easy-VQA 1.0 (Victor Zhou, MIT), in a package: 5,000 pictures of coloured shapes, 48,248 questions, 13 answers.

The official test split is kept whole. `val` is held out of the training images, so that nothing is selected on test.
One sample is one image with all its questions: a frozen vision tower then runs once per image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from data_prep.sources.base import RawSample, Source
from data_prep.sources.common.questions import most_frequent
from mmpeft_ds.errors import BadInput

COLORS = {"black", "gray", "red", "green", "blue", "yellow", "brown", "teal"}
SHAPES = {"circle", "rectangle", "triangle"}
SPLITS = ["train", "val", "test"]


@dataclass
class Options:
    """Options of the source.

    Attributes:
        val_fraction: share of the training images that becomes the split `val`, chosen by a hash of the image id.
    """

    val_fraction: float = 0.05


class EasyVQA(Source):
    Options = Options
    licence = "MIT"

    def __init__(self, options: Options):
        if not 0 < options.val_fraction < 1:
            raise BadInput(f"--val-fraction: {options.val_fraction} is not between 0 and 1, for example 0.05.")
        self.options = options

    def splits(self) -> list[str]:
        _package()
        return list(SPLITS)

    def fingerprint(self) -> dict[str, str]:
        data = Path(_package().__file__).parent / "data"
        files = [data / part / "questions.json" for part in ("train", "test")]
        hashes = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        return {"easy-vqa": metadata.version("easy-vqa"), **hashes}

    def labels(self, split: str) -> list[str]:
        """Answers of the split, the most frequent first, equals in alphabetic order."""
        counts = Counter(a for i in self._images[split] for _, a in self._questions[split].get(i, []))
        return most_frequent(counts)

    def count(self, split: str) -> int:
        return len(self._images[split])

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        part = "test" if split == "test" else "train"
        for i in self._images[split][start:]:
            record = {
                "questions": [
                    {"question": question, "answers": [answer], "type": question_type(answer)}
                    for question, answer in self._questions[split].get(i, [])
                ]
            }
            yield RawSample(f"{part}/{i}.png", [("png", Path(self._paths[part][i]).read_bytes())], record)

    @cached_property
    def _paths(self) -> dict[str, dict[int, str]]:
        package = _package()
        return {"train": package.get_train_image_paths(), "test": package.get_test_image_paths()}

    @cached_property
    def _images(self) -> dict[str, list[int]]:
        """Split -> image ids in order; train and val share the ids of the official training split."""
        train = sorted(self._paths["train"])
        by_hash = sorted(train, key=lambda i: hashlib.blake2b(f"easy-vqa/{i}".encode()).digest())
        val = set(by_hash[: round(len(train) * self.options.val_fraction)])
        return {
            "train": [i for i in train if i not in val],
            "val": sorted(val),
            "test": sorted(self._paths["test"]),
        }

    @cached_property
    def _questions(self) -> dict[str, dict[int, list[tuple[str, str]]]]:
        package = _package()
        train, test = _by_image(package.get_train_questions()), _by_image(package.get_test_questions())
        return {"train": train, "val": train, "test": test}


def question_type(answer: str) -> str:
    """`yes/no`, `shape` or `color`: what a question asks for, read off its answer (the package does not say)."""
    if answer in ("yes", "no"):
        return "yes/no"
    if answer in SHAPES:
        return "shape"
    if answer in COLORS:
        return "color"
    raise ValueError(f"answer {answer!r} is neither yes/no nor one of the shapes and colors of easy-VQA")


def _by_image(questions: tuple[list[str], list[str], list[int]]) -> dict[int, list[tuple[str, str]]]:
    grouped: dict[int, list[tuple[str, str]]] = {}
    for text, answer, image in zip(*questions, strict=True):
        grouped.setdefault(image, []).append((text, answer))
    return grouped


def _package():
    try:
        import easy_vqa
    except ImportError as error:
        raise BadInput("easy-vqa: the package with the data is not installed: pip install easy-vqa==1.0") from error
    return easy_vqa


ENTRY = EasyVQA
