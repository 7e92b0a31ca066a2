"""Splits of small collections: the same share of every class, chosen by hash, and no caption in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence

from mmpeft_ds.errors import BadInput

SPLITS = ("train", "val", "test")


def check_shares(val: float, test: float) -> None:
    """Raises BadInput unless both shares leave something for training."""
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share < 1:
            raise BadInput(f"--{name}-fraction: {share} is not in [0, 1), for example 0.1.")
    if val + test >= 1:
        raise BadInput("--val-fraction and --test-fraction: together they leave nothing for training.")


def by_hash(groups: Mapping[str, Sequence[str]], val: float, test: float) -> dict[str, str]:
    """Member -> split, the same shares of every group whatever the other groups are.

    Args:
        groups: group -> names of its members, which decide alone; a name in two groups is a member of the first.
    """
    chosen: dict[str, str] = {}
    for members in groups.values():
        order = sorted(
            (name for name in dict.fromkeys(members) if name not in chosen),
            key=lambda name: hashlib.blake2b(name.encode()).digest(),
        )
        tests, vals = round(len(order) * test), round(len(order) * val)
        for position, name in enumerate(order):
            chosen[name] = "test" if position < tests else "val" if position < tests + vals else "train"
    return chosen


def disjoint_captions(captions: Mapping[Hashable, Sequence[str]], split: Mapping[Hashable, str]) -> dict:
    """`captions` of every item without those that a later split has too: test keeps its own, then val, then train.

    Two captions are one if they differ in case and spaces alone. The order and the keys stay; lists may become empty.
    """
    taken: set[str] = set()
    kept: dict = {}
    for name in reversed(SPLITS):
        here = {item: list(texts) for item, texts in captions.items() if split[item] == name}
        kept |= {item: [t for t in texts if same_words(t) not in taken] for item, texts in here.items()}
        taken |= {same_words(text) for texts in here.values() for text in texts}
    return {item: kept[item] for item in captions}


def same_words(text: str) -> str:
    """A caption as it is compared: lower case, single spaces."""
    return " ".join(text.casefold().split())
