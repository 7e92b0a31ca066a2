"""Caption files in the forms that several data sets share: COCO's, Karpathy's, BLIP's.

A sample is a picture with `captions`, the texts as they were written (they may end in a blank: it is stripped on use),
`image_id` and the captions' own ids under `caption_id` where the files have them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.common import annotations
from data_prep.sources.common.entry import Aside, Elsewhere, Entry, finding_split
from data_prep.sources.common.index import Index

SPLITS = ("train", "val", "test")
LISTED_BEFORE = "listed before"  # reason to set a line of a list of pictures aside
COCO_KARPATHY = ("dataset_coco.json", "annotations/dataset_coco.json")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def caption(value: Any, name: str) -> str:
    """A caption of a record as it is.

    Raises:
        Aside: if it has no words, under `name`.
        ValueError: if it is no text.
    """
    if not annotations.text(value).strip():
        raise Aside("caption empty", name)
    return value


def coco(
    file: Path,
    split: str,
    index: Index,
    path: Callable[[dict[str, Any]], str],
    check: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Iterator[Entry]:
    """Entries of a COCO-form file: `images` and `annotations`, joined by the picture's id, in any order.

    Args:
        path: of an object of `images`, its picture below the folder of the pictures.
        check: raises Aside for an annotation that does not count.
    """
    images = f"{split} images"
    numbers = itertools.count()

    def picture(image: Any) -> list[tuple[str, Any]]:
        return [(str(image["id"]), (image["id"], path(image), next(numbers)))]

    index.put_once(images, split, annotations.items(file, "images"), picture, "image", LISTED_BEFORE)
    captioned = bytearray()  # a byte a picture

    def entry(pair: tuple[Any, Any]) -> Entry:
        row, found = pair
        check(row)
        if found is None:
            raise Aside("picture not listed under `images`", str(row["image_id"]))
        number, name, place = found
        item = {"caption": caption(row["caption"], str(row["id"])), "id": row["id"]}
        captioned.extend(bytes(max(place + 1 - len(captioned), 0)))
        captioned[place] = 1
        return Entry(name, [name], item, {"image_id": number}, key=str(row["id"]))

    yield from index.parsed(split, index.joined(images, annotations.items(file, "annotations"), "image_id"), entry)
    captioned.extend(bytes(next(numbers)))  # of the pictures behind the last one with a caption
    without = sorted((place, name) for _, name, place in index.values(images) if not captioned[place])
    for _, name in without:
        index.without_text(split, name)


def uncaptioned(file: Path, split: str, index: Index, path: Callable[[dict[str, Any]], str]) -> Iterator[Entry]:
    """Entries of a COCO-form file whose pictures have no captions, for prediction alone."""

    def entry(image: Any) -> Entry:
        return Entry(path(image), [path(image)], None, {"image_id": image["id"]}, key=str(image["id"]))

    return index.parsed(split, annotations.items(file, "images"), entry)


def karpathy(
    file: Path, split: str, index: Index, path: Callable[[dict[str, Any]], str], id_key: str, first: bool
) -> Iterator[Entry]:
    """Entries of one split of Karpathy's file; `restval` belongs to training.

    Args:
        first: whether no other split of the file is read before; what belongs to none is reported there.
        path: of an object of `images`, its picture below the folder of the pictures.
        id_key: where the picture's id stands.
    """

    def entry(pair: tuple[Any, Any]) -> Entry:
        image, sentence = pair
        with finding_split(first):
            actual = KARPATHY_SPLITS.get(image.get("split"))
        if actual != split and (actual or not first):
            raise Elsewhere
        name = path(image)
        if actual is None:
            raise Aside(f"split that is none of {', '.join(KARPATHY_SPLITS)}", name)
        if image["sentences"] == []:
            index.without_text(split, name)
            raise Elsewhere
        item = {"caption": caption(sentence["raw"], str(sentence["sentid"])), "id": sentence["sentid"]}
        return Entry(name, [name], item, {"image_id": image[id_key]}, key=str(sentence["sentid"]))

    return index.parsed(split, annotations.nested(annotations.items(file, "images"), "sentences"), entry)


def karpathy_split(image: Any) -> list[tuple[str, str | None]]:
    """(id, split) of a picture of Karpathy's file of COCO, None where it names no known one."""
    return [(str(image["cocoid"]), KARPATHY_SPLITS.get(image["split"]))]


def blip(
    file: Path, split: str, index: Index, path: Callable[[str], str], image_id: Callable[[str], Any]
) -> Iterator[Entry]:
    """Entries of a list of BLIP: a row per caption for training, a row per picture with a list for the others."""

    def entry(pair: tuple[Any, Any]) -> Entry:
        row, said = pair
        image = annotations.text(row["image"])
        name = path(image)
        if row["caption"] == []:
            index.without_text(split, name)
            raise Elsewhere
        said = row["caption"] if isinstance(row["caption"], str) else said
        return Entry(name, [name], {"caption": caption(said, name)}, {"image_id": image_id(image)})

    return index.parsed(split, annotations.nested(annotations.items(file), "caption"), entry)


def tokens(
    file: Path,
    split: str,
    index: Index,
    folder: str,
    wanted: Collection[str] | None = None,
    elsewhere: Collection[str] | None = None,
) -> Iterator[Entry]:
    """Entries of a token file: `name.jpg#k<TAB>caption` a line.

    Args:
        folder: of the pictures.
        wanted: names of the split's pictures; None takes all.
        elsewhere: names of the pictures of all splits, given for one split alone, in which rows of other pictures, and
            those of another form, are set aside.
    """

    captioned: set[str] = set()

    def entry(line: str) -> Entry:
        key, tab, said = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not tab or not mark:
            if wanted is not None and elsewhere is None:  # another split tells of it
                raise Elsewhere
            raise Aside("line of another form", line[:60])
        if wanted is not None and name not in wanted:
            if elsewhere is not None and name not in elsewhere:
                raise Aside("picture in no list", key)
            raise Elsewhere
        said = caption(said, key).strip()
        captioned.add(name)
        path = f"{folder}/{name}"
        return Entry(path, [path], {"caption": said}, {"image_id": PurePosixPath(name).stem}, key=key)

    yield from index.parsed(split, annotations.lines(file), entry)
    for name in (name for name in wanted or () if name not in captioned):
        index.without_text(split, name)


def names(file: Path, split: str, index: Index) -> dict[str, None]:
    """Names that a list of pictures or videos has, one a line, in its order; those that stand again are set aside."""
    listed: dict[str, None] = {}
    for line in annotations.lines(file):
        name = line.strip()
        if name in listed:
            index.set_aside(split, LISTED_BEFORE, name)
        listed[name] = None
    return listed


def record(items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The record of a picture with its captions."""
    ids = [item["id"] for item in items if "id" in item]
    return fields | {"captions": [item["caption"] for item in items]} | ({"caption_ids": ids} if ids else {})
