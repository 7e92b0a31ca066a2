"""Identity of pictures: which samples show the same ones, and which captions belong to several.

Retrieval takes samples with equal pictures as one picture, and every caption as the text of its own picture. Both are
said when a data set is prepared, since a file with one line per caption looks as if it had more pictures than it has.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from mmpeft_ds.data.video import FIELDS as VIDEO_FIELDS

PICTURE = "picture"  # key of a record: `content_id` of its images, where a task asks for it
BLOCK = 1 << 18  # identities compared at a time, which bounds the memory for any number of samples
Arrays = Mapping[str, np.ndarray]


def content_id(contents: Iterable[bytes]) -> str:
    """Identity of the pictures of a sample, 16 hexadecimal digits: equal for equal bytes in the same order."""
    return _together(_digest(data) for data in contents)


class Contents:
    """Identities of the pictures and captions of samples, 8 bytes each."""

    def __init__(self) -> None:
        self._of = {name: array("Q") for name in ("samples", "pictures", "captions")}
        self._counts = {name: array("I") for name in ("pictures", "captions")}

    def add(self, sample: Any) -> None:
        """Add a raw sample."""
        record = sample.record
        seen = [data for _, data in sample.images] if sample.features is None else [sample.features.tobytes()]
        if PICTURE in record:
            whole = _number(str(record[PICTURE]))
            pictures = [whole]
        else:
            digests = [_digest(data) for data in seen]
            whole = int(_together(digests), 16) if digests else 0
            # Frames are no pictures of their own: many videos begin with the same black one.
            single = len(digests) == 1 or not record.keys().isdisjoint(VIDEO_FIELDS)
            pictures = [whole] if single else [int(_together([digest]), 16) for digest in digests]
        captions = record.get("captions")
        self._of["samples"].append(whole)
        self._put("pictures", pictures)
        self._put("captions", [_number(c) for c in captions] if isinstance(captions, list) else [])

    def arrays(self) -> dict[str, np.ndarray]:
        """`samples`: of the pictures of each together, 0 without any; `pictures` and `captions`: of each one;
        `picture_counts` and `caption_counts`: how many of them each sample has."""
        arrays = {name: np.array(values, dtype=np.uint64) for name, values in self._of.items()}
        counts = {f"{name[:-1]}_counts": np.array(values, dtype=np.uint32) for name, values in self._counts.items()}
        return arrays | counts

    def _put(self, name: str, numbers: list[int]) -> None:
        self._of[name].extend(numbers)
        self._counts[name].append(len(numbers))


def summary(blocks: Callable[[], Iterator[Arrays]]) -> dict[str, dict[str, int]]:
    """Field path -> what `Manifest.fields` holds besides, of all samples of a split.

    Args:
        blocks: gives again `Contents.arrays` of the split's shards, in order; called several times where there are
            many samples.

    Returns:
        `distinct` of `images`: different pictures of the `of` samples that show any, where some show the same;
        `shared` of `captions[]`: captions whose words another picture has too, where there are any.
    """
    shown = distinct = shared = 0
    for here in passes(blocks, "samples"):
        different = []
        for block in blocks():
            pictures = here(block["samples"])
            pictures = pictures[pictures != 0]
            shown += len(pictures)
            different.append(np.unique(pictures))
        distinct += len(np.unique(np.concatenate(different or [_NONE])))
    for here in passes(blocks, "captions"):
        shared += _shared(here, blocks)
    numbers = {}
    if distinct < shown:
        numbers["images"] = {"distinct": distinct, "of": shown}
    if shared:
        numbers["captions[]"] = {"shared": shared}
    return numbers


def passes(blocks: Callable[[], Iterator[Arrays]], name: str) -> Iterator[Callable[..., np.ndarray]]:
    """Functions that take the identities of one pass, or what stands beside them, so that about `BLOCK` are held."""
    total = sum(len(block[name]) for block in blocks())
    count = -(-total // BLOCK) or 1
    for number in range(count):
        # By the low digits, which are as good as random.
        yield lambda keys, values=None, n=number: (keys if values is None else values)[keys % np.uint64(count) == n]


def _shared(here: Callable[..., np.ndarray], blocks: Callable[[], Iterator[Arrays]]) -> int:
    """Captions of one pass that belong to more than one picture."""
    repeated = _repeated(here(block["captions"]) for block in blocks())
    if not len(repeated):
        return 0
    # Of the few that stand several times: how often each does, and its lowest and highest owner.
    number = np.zeros(len(repeated), dtype=np.int64)
    low, high = np.full(len(repeated), 2**64 - 1, dtype=np.uint64), np.zeros(len(repeated), dtype=np.uint64)
    first = 0
    for block in blocks():
        samples = block["samples"]
        numbers = np.arange(first, first + len(samples), dtype=np.uint64)
        owner = np.repeat(np.where(samples != 0, samples, numbers), block["caption_counts"])
        text, owner = here(block["captions"]), here(block["captions"], owner)
        at = np.minimum(np.searchsorted(repeated, text), len(repeated) - 1)
        same = repeated[at] == text
        at, owner = at[same], owner[same]
        np.add.at(number, at, 1)
        np.minimum.at(low, at, owner)
        np.maximum.at(high, at, owner)
        first += len(samples)
    return int(number[low != high].sum())


def _repeated(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Values that stand several times in all blocks together, in order."""
    seen = []
    for block in blocks:
        values, counts = np.unique(block, return_counts=True)
        seen += [values, values[counts > 1]]
    together = np.concatenate(seen or [_NONE])
    together.sort()
    return np.unique(together[1:][together[1:] == together[:-1]])


_NONE = np.zeros(0, dtype=np.uint64)


def _digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)  # no defence against forgery, which nobody gains from; many times as fast


def _together(digests: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(digests), digest_size=8).hexdigest()


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def notes(split: str, fields: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for the user about the fields of a split."""
    images, captions = fields.get("images", {}), fields.get("captions[]", {})
    lines = []
    if "distinct" in images:
        lines.append(
            f"{split}: {images['of']:,} samples show {images['distinct']:,} different pictures. Retrieval "
            "and captioning take equal ones as one picture with the captions of all."
        )
    if "shared" in captions:
        lines.append(
            f"{split}: {captions['shared']:,} of {captions['present']:,} captions belong to more than one picture. "
            "In retrieval each counts for its own picture alone, so `img_r1` stays below 100."
        )
    answers = fields.get("questions[].answers", {})
    if answers.get("max", 0) > 1 and answers["min"] < 10:
        lines.append(
            f"{split}: questions have {answers['min']} to {answers['max']} answers. The official VQA measure is made "
            "for ten: of two or three a right answer scores below 1. `accuracy_any` stands beside it."
        )
    return lines
