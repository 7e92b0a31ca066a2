"""Tux Paint's stamps: some 500 small photographs and drawings with a sentence each, sorted into folders.

    make few-shot-data        unpacks Debian's tuxpaint-stamps-default into data/raw/stamps, without root

The class is the folder, the caption is the first line of the text beside the image, in English. Signs, coins and
letters (`symbols`) are left out, as are the flipped copies. Images are put on white and padded to squares. Images with
the same caption are in the same split. GPL-2: shards made from it may be passed on under that licence alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from data_prep.common.duplicates import SHOWN
from data_prep.sources.base import RawSample, Source
from data_prep.sources.common.splits import SPLITS, by_hash, check_shares, disjoint_captions, same_words
from mmpeft_ds.errors import BadInput

LEFT_OUT = "symbols"
COPIES = ("_mirror", "_flip", "_mirror_flip")
DRAWN = "cartoon"
NO_TEXT = "no text beside the picture"


@dataclass
class Options:
    """Options of the source.

    Attributes:
        root: folder of the stamps.
        style: `photo` leaves out the folders of cartoons, `drawing` everything else; the classes are those of `all`.
        min_images: folders with fewer images, of both styles, are left out.
        size: side of the squares; larger images are made smaller, small ones stay as they are.
        val_fraction: share of every class that becomes the split `val`, chosen by a hash of the caption.
        test_fraction: share of every class that becomes the split `test`.
    """

    root: Path = Path("data/raw/stamps/usr/share/tuxpaint/stamps")
    style: Literal["all", "photo", "drawing"] = "all"
    min_images: int = 12
    size: int = 256
    val_fraction: float = 0.1
    test_fraction: float = 0.35


@dataclass(frozen=True)
class Stamp:
    """One image: where it is, its class, caption, split and whether it is a cartoon."""

    path: Path
    class_name: str
    caption: str
    split: str
    drawn: bool


class Stamps(Source):
    Options = Options
    licence = "GPL-2.0 (tuxpaint-stamps)"

    def __init__(self, options: Options):
        check_shares(options.val_fraction, options.test_fraction)
        if options.size < 1:
            raise BadInput(f"--size: {options.size} is too small, for example 256.")
        if not options.root.is_dir():
            raise BadInput(
                f"--root {options.root}: no such directory. Run `make few-shot-data`, or install the Debian package "
                "tuxpaint-stamps-default and give /usr/share/tuxpaint/stamps."
            )
        self.options = options

    def splits(self) -> list[str]:
        splits = [split for split in SPLITS if self._of(split)]
        if "train" not in splits and self.options.style != "drawing":
            raise BadInput(
                f"{self.options.root}: no folder holds {self.options.min_images} PNG images with a text. Lower "
                "--min-images, or give the folder `stamps` of the package."
            )
        return splits

    def fingerprint(self) -> dict[str, str]:
        """A hash of names, sizes and captions."""
        digest = hashlib.sha256()
        for s in self._stamps:
            digest.update(f"{self._name(s)}\t{s.path.stat().st_size}\t{s.caption}\n".encode())
        return {"names, sizes and captions": digest.hexdigest()}

    def labels(self, split: str) -> list[str]:
        """Folders in alphabetic order, the same for every style."""
        return sorted({stamp.class_name for stamp in self._stamps})

    def count(self, split: str) -> int:
        return len(self._of(split))

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        index = {name: i for i, name in enumerate(self.labels(split))}
        for stamp in self._of(split)[start:]:
            record = {"label": index[stamp.class_name], "class_name": stamp.class_name, "captions": [stamp.caption]}
            record["style"] = "drawing" if stamp.drawn else "photo"
            yield RawSample(self._name(stamp), [("png", squared(stamp.path, self.options.size))], record)

    def account(self, split: str) -> dict[str, Any]:
        """Pictures without a text, which belong to no split and are told under the first one."""
        without = [self._relative(path) for path in self._pictures if not _caption(path)]
        told = {"aside": {NO_TEXT: [len(without), without[:SHOWN]]}} if without else {}
        return told if split == self.splits()[0] else {}

    def _of(self, split: str) -> list[Stamp]:
        wanted = {"all": (True, False), "photo": (False,), "drawing": (True,)}[self.options.style]
        return [stamp for stamp in self._stamps if stamp.split == split and stamp.drawn in wanted]

    def _name(self, stamp: Stamp) -> str:
        return self._relative(stamp.path)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.options.root).as_posix()

    @cached_property
    def _pictures(self) -> list[Path]:
        """All images of folders that may be classes, but for the flipped copies, in order of path."""
        paths = sorted(self.options.root.rglob("*.png"))
        folders = (path.relative_to(self.options.root).parts[:-1] for path in paths)
        return [
            path
            for path, above in zip(paths, folders, strict=True)
            if above and above[0] != LEFT_OUT and not path.stem.endswith(COPIES)
        ]

    @cached_property
    def _stamps(self) -> list[Stamp]:
        """All images of the classes, of any style, in order of path."""
        stamps: list[tuple[Path, str, str]] = []
        for path in self._pictures:
            if caption := _caption(path):
                stamps.append((path, path.relative_to(self.options.root).parts[0].replace("_", " "), caption))
        sizes: dict[str, list[str]] = {}
        for _, name, caption in stamps:
            sizes.setdefault(name, []).append(caption)
        stamps = [stamp for stamp in stamps if len(sizes[stamp[1]]) >= self.options.min_images]
        # A caption, not an image, is what is drawn: so no caption is in two splits of a class ...
        groups = {name: [same_words(c) for c in sizes[name]] for name in sorted({name for _, name, _ in stamps})}
        split = by_hash(groups, self.options.val_fraction, self.options.test_fraction)
        # ... and none in two splits of two classes.
        of_path = {path: split[same_words(caption)] for path, _, caption in stamps}
        kept = disjoint_captions({path: [caption] for path, _, caption in stamps}, of_path)
        return [
            Stamp(path, name, caption, of_path[path], DRAWN in path.relative_to(self.options.root).parts)
            for path, name, caption in stamps
            if kept[path]
        ]


def squared(path: Path, size: int) -> bytes:
    """PNG of an image on white, padded to a square of at most `size` pixels. Raises BadInput."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGBA")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error}).") from error
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    buffer = io.BytesIO()
    square.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _caption(path: Path) -> str:
    """First line of the text beside an image, empty without one."""
    try:
        lines = path.with_suffix(".txt").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[0].strip() if lines else ""


ENTRY = Stamps
