"""Emoji as three vendors draw them, out of npm packages: one set of classes and captions in three styles.

    make few-shot-data        fetches the packages into data/raw/emoji/node_modules

@lobehub/fluent-emoji-3d (256 px), emoji-datasource-twitter and emoji-datasource-google (64 px); names and classes
from the latter two, keywords from emojilib. A class is one of Unicode's subcategories. Which emoji is in which split
depends on the emoji alone, so a model trained on one vendor has seen no test emoji of the others. No caption occurs in
two splits. The captions are people's names for the things: they say what is to be seen, often with the class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.base import RawSample, Source
from data_prep.sources.common.splits import SPLITS, by_hash, check_shares, disjoint_captions
from mmpeft_ds.errors import BadInput

PACKAGES = {
    "fluent": "@lobehub/fluent-emoji-3d",
    "twitter": "emoji-datasource-twitter",
    "google": "emoji-datasource-google",
}
LICENCES = {
    "fluent": "images MIT (Microsoft Fluent Emoji)",
    "twitter": "images CC-BY-4.0 (Twitter, Twemoji)",
    "google": "images Apache-2.0 (Google, Noto Emoji)",
}
TEXT_LICENCE = "names MIT (emoji-data), keywords MIT (emojilib)"
KEYWORDS = "emojilib"
# Flags, people and symbols are left out: hundreds of near-copies that differ in sex, skin or a letter.
CATEGORIES = [
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
]
# What people would say; other subcategories keep Unicode's words.
CLASSES = {
    "event": "celebration",
    "sport": "sports equipment",
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal-mammal": "mammal",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-asian": "asian food",
    "food-fruit": "fruit",
    "food-prepared": "meal",
    "food-sweet": "dessert",
    "food-vegetable": "vegetable",
    "book-paper": "book or paper",
    "computer": "computer part",
    "household": "household item",
    "light & video": "lamp or camera",
    "musical-instrument": "musical instrument",
    "office": "office supply",
    "emotion": "comic symbol",
    "cat-face": "cat face",
    "face-concerned": "worried face",
    "face-neutral-skeptical": "neutral face",
    "face-smiling": "smiling face",
    "face-unwell": "sick face",
    "place-building": "building",
    "place-other": "scenery",
    "sky & weather": "sky or weather",
    "time": "clock",
    "transport-air": "air transport",
    "transport-ground": "land transport",
    "transport-water": "ship or boat",
}


@dataclass
class Options:
    """Options of the source.

    Attributes:
        vendor: whose drawings.
        root: the node_modules folder that holds the packages.
        categories: Unicode's categories to take.
        min_images: subcategories with fewer emoji are left out.
        val_fraction: share of every class that becomes the split `val`, chosen by a hash of the emoji.
        test_fraction: share of every class that becomes the split `test`.
    """

    vendor: Literal["fluent", "twitter", "google"] = "fluent"
    root: Path = Path("data/raw/emoji/node_modules")
    categories: list[str] = field(default_factory=lambda: list(CATEGORIES))
    min_images: int = 12
    val_fraction: float = 0.1
    test_fraction: float = 0.35


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points in lower case, class, captions and split."""

    code: str
    class_name: str
    captions: tuple[str, ...]
    split: str


class EmojiSource(Source):
    Options = Options

    def __init__(self, options: Options):
        check_shares(options.val_fraction, options.test_fraction)
        self.options = options
        self.licence = f"{LICENCES[options.vendor]}; {TEXT_LICENCE}"

    def splits(self) -> list[str]:
        splits = [split for split in SPLITS if self._images[split]]
        if "train" not in splits:
            raise BadInput(
                f"emoji: no class of {', '.join(self.options.categories)} has {self.options.min_images} emoji. "
                f"Lower --min-images, or name other --categories: {', '.join(sorted(self._known_categories))}."
            )
        return splits

    def fingerprint(self) -> dict[str, str]:
        """Versions of the packages, and a hash of the names and sizes of the images."""
        digest = hashlib.sha256()
        for split, images in self._images.items():
            for emoji, path in images:
                digest.update(f"{split}\t{emoji.code}\t{path.stat().st_size}\n".encode())
        packages = {PACKAGES[self.options.vendor], self._names_package, KEYWORDS}
        return {name: self._version(name) for name in sorted(packages)} | {"images": digest.hexdigest()}

    def labels(self, split: str) -> list[str]:
        """Classes in alphabetic order, the same for every vendor."""
        return sorted({emoji.class_name for emoji in self._emoji})

    def count(self, split: str) -> int:
        return len(self._images[split])

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        index = {name: i for i, name in enumerate(self.labels(split))}
        for emoji, path in self._images[split][start:]:
            record = {
                "label": index[emoji.class_name],
                "class_name": emoji.class_name,
                "captions": list(emoji.captions),
                "emoji": emoji.code,
            }
            name = f"{self.options.vendor}/{emoji.code}"
            yield RawSample(name, [(path.suffix[1:], path.read_bytes())], record)

    @cached_property
    def _images(self) -> dict[str, list[tuple[Emoji, Path]]]:
        """Split -> the emoji that this vendor draws, in order of class and code."""
        emoji_of: dict[str, list[tuple[Emoji, Path]]] = {split: [] for split in SPLITS}
        folder = self._folder(PACKAGES[self.options.vendor])
        folder /= "assets" if self.options.vendor == "fluent" else f"img/{self.options.vendor}/64"
        suffix = ".webp" if self.options.vendor == "fluent" else ".png"
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        for emoji in self._emoji:
            # Some packages leave out the variation selector.
            names = (emoji.code + suffix, emoji.code.replace("-fe0f", "") + suffix)
            name = next((n for n in names if n in there), None)
            if name is not None:
                emoji_of[emoji.split].append((emoji, folder / name))
        return emoji_of

    @cached_property
    def _emoji(self) -> list[Emoji]:
        """All emoji of the classes, whoever draws them, in order of class and code."""
        classes: dict[str, list[dict[str, Any]]] = {}
        for entry in self._entries:
            if entry["category"] in self.options.categories:
                classes.setdefault(entry["subcategory"], []).append(entry)
        classes = {name: entries for name, entries in classes.items() if len(entries) >= self.options.min_images}
        codes = {name: [_code(entry) for entry in entries] for name, entries in classes.items()}
        split = by_hash(codes, self.options.val_fraction, self.options.test_fraction)
        captions = {_code(e): self._captions(e) for entries in classes.values() for e in entries}
        captions = disjoint_captions(captions, split)
        names = {
            code: CLASSES.get(name, name.replace("-", " ")) for name, of_class in codes.items() for code in of_class
        }
        emojis = [Emoji(code, names[code], tuple(captions[code]), split[code]) for code in names if captions[code]]
        return sorted(emojis, key=lambda emoji: (emoji.class_name, emoji.code))

    def _captions(self, entry: dict[str, Any]) -> list[str]:
        """The official name; the everyday one; and the latter with keywords. First come first, no two the same."""
        official = entry["name"].lower()
        everyday, *keywords = [w.replace("_", " ") for w in self._keywords.get(_code(entry), [])] or [official]
        return list(dict.fromkeys([official, everyday, ", ".join(dict.fromkeys([everyday, *keywords]))]))

    @cached_property
    def _entries(self) -> list[dict[str, Any]]:
        """Emoji that both Twitter and Google draw, as emoji-data lists them: so all vendors have the same classes."""
        path = self._folder(self._names_package) / "emoji.json"
        entries = self._json(path)
        try:
            return [e for e in entries if e["has_img_twitter"] and e["has_img_google"] and e["name"]]
        except (TypeError, KeyError) as error:
            raise BadInput(f"{path}: not the table of emoji-data ({error}). Install the package again.") from error

    @cached_property
    def _keywords(self) -> dict[str, list[str]]:
        """Code points -> words, the everyday name first."""
        words = self._json(self._folder(KEYWORDS) / "dist" / "emoji-en-US.json")
        return {"-".join(f"{ord(c):04x}" for c in emoji): names for emoji, names in words.items()}

    @property
    def _known_categories(self) -> set[str]:
        return {entry["category"] for entry in self._entries}

    @cached_property
    def _names_package(self) -> str:
        """The package with the table of names: both have the same one."""
        both = (PACKAGES["twitter"], PACKAGES["google"])
        return next((name for name in both if (self.options.root / name).is_dir()), both[0])

    def _folder(self, package: str) -> Path:
        folder = self.options.root / package
        if not folder.is_dir():
            raise BadInput(
                f"{folder}: not installed. Run `make few-shot-data`, or npm install --ignore-scripts {package}, and "
                "give its node_modules folder as --root."
            )
        return folder

    def _version(self, package: str) -> str:
        return self._json(self._folder(package) / "package.json")["version"]

    @staticmethod
    def _json(path: Path) -> Any:
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: cannot be read ({error}). Install the package again.") from error


def _code(entry: dict[str, Any]) -> str:
    return entry["unified"].lower()


ENTRY = EmojiSource
