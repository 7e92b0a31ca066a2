"""Identity of pictures: which samples show the same ones, and which captions belong to several.

Retrieval takes samples with equal pictures as one picture, and every caption as the text of its own picture. Both are
said when a data set is prepared, since a file with one line a caption looks as if it had more pictures than it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

PICTURE = "picture"  # key of a record: `content_id` of its images, where a task asks for it


def content_id(contents: Iterable[bytes]) -> str:
    """Identity of the pictures of a sample, 16 hexadecimal digits: equal for equal bytes in the same order."""
    digest = hashlib.blake2b(digest_size=8)
    for data in contents:
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    return digest.hexdigest()


def contents(sample: Any) -> tuple[str, list[str]]:
    """Identity of the pictures of a raw sample (empty without any), and of each of its captions."""
    record = sample.record
    captions = record.get("captions")
    texts = [content_id([c.encode()]) for c in captions] if isinstance(captions, list) else []
    if PICTURE in record:
        return str(record[PICTURE]), texts
    seen = [data for _, data in sample.images] if sample.features is None else [sample.features.tobytes()]
    return content_id(seen) if seen else "", texts


def summary(samples: Sequence[tuple[str, Sequence[str]]]) -> dict[str, dict[str, int]]:
    """Field path -> what `Manifest.fields` holds besides, of the `contents` of all samples of a split.

    Returns:
        `distinct` of `images`: different pictures of the `of` samples that show any, where some show the same;
        `shared` of `captions[]`: captions whose words another picture has too, where there are any.
    """
    pictures = [picture for picture, _ in samples if picture]
    owners: dict[str, set[str]] = {}
    for number, (picture, captions) in enumerate(samples):
        for caption in captions:
            owners.setdefault(caption, set()).add(picture or str(number))
    shared = sum(len(owners[caption]) > 1 for _, captions in samples for caption in captions)
    numbers = {}
    if len(set(pictures)) < len(pictures):
        numbers["images"] = {"distinct": len(set(pictures)), "of": len(pictures)}
    if shared:
        numbers["captions[]"] = {"shared": shared}
    return numbers


def notes(split: str, fields: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for the user about the fields of a split."""
    images, captions = fields.get("images", {}), fields.get("captions[]", {})
    lines = []
    if "distinct" in images:
        lines.append(
            f"{split}: {images['of']:,} samples show {images['distinct']:,} different pictures. Retrieval takes equal "
            "ones as one picture with the captions of all."
        )
    if "shared" in captions:
        lines.append(
            f"{split}: {captions['shared']:,} of {captions['present']:,} captions belong to more than one picture. "
            "In retrieval each counts for its own picture alone, so `img_r1` stays below 100."
        )
    answers = fields.get("questions[].answers", {})
    if 1 < answers.get("max", 0) < 10:
        lines.append(
            f"{split}: questions have at most {answers['max']} answers. The official VQA measure is made for ten: of "
            "two or three a right answer scores below 1. `accuracy_any` stands beside it."
        )
    return lines
