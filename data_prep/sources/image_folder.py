"""A folder of images whose sub-folders are the classes, with or without train/val/test folders above them.

FOLDER/cat/1.jpg FOLDER/dog/1.jpg            one split, or a hash split with --val-fraction, --test-fraction
FOLDER/train/cat/1.jpg FOLDER/val/cat/2.jpg  the splits as they are
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.sources.base import RawSample
from mmpeft_ds.errors import BadInput

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Options:
    """Options of the source.

    Attributes:
        folder: folder that holds the class folders, or train/val/test folders of them.
        val_fraction: share of every class that becomes the split `val`, chosen by a hash of the file name.
        test_fraction: share of every class that becomes the split `test`.
        licence: written to the manifest.
    """

    folder: Path
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    licence: str = "unknown"


class ImageFolder:
    Options = Options

    def __init__(self, options: Options):
        self.options = options
        self.licence = options.licence
        if not options.folder.is_dir():
            raise BadInput(f"--folder {options.folder}: no such directory.")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(options, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise BadInput(f"{flag}: {getattr(options, name)} is not in [0, 1), for example 0.1.")
        if options.val_fraction + options.test_fraction >= 1:
            raise BadInput("--val-fraction and --test-fraction: together they leave nothing for training.")

    def splits(self) -> list[str]:
        unknown = sorted({c for images in self._images.values() for c, _ in images} - set(self._classes))
        if unknown:
            raise BadInput(f"{self.options.folder}: class {unknown[0]!r} has no training images. Remove or move it.")
        return list(self._images)

    def fingerprint(self) -> dict[str, str]:
        """Names and sizes of all images: a changed file of the same size goes unnoticed, and nothing is read twice."""
        digest = hashlib.sha256()
        for split, images in self._images.items():
            for _, path in images:
                digest.update(f"{split}\t{path.relative_to(self.options.folder)}\t{path.stat().st_size}\n".encode())
        return {"image names and sizes": digest.hexdigest()}

    def labels(self, split: str) -> list[str]:
        return self._classes

    def count(self, split: str) -> int:
        return len(self._images[split])

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        index = {name: i for i, name in enumerate(self._classes)}
        for name, path in self._images[split][start:]:
            record = {"label": index[name], "class_name": name}
            source_name = str(path.relative_to(self.options.folder))
            yield RawSample(source_name, [(path.suffix[1:], path.read_bytes())], record)

    @cached_property
    def _classes(self) -> list[str]:
        """Class names in alphabetic order, which is the class index."""
        return sorted({name for name, _ in next(iter(self._images.values()))})

    @cached_property
    def _images(self) -> dict[str, list[tuple[str, Path]]]:
        """Split -> (class, file) in order of class and name; the training split comes first."""
        folder = self.options.folder
        found = {p.name: p for p in sorted(folder.iterdir()) if p.is_dir()}
        if "train" in found:
            strange = sorted(set(found) - set(SPLIT_FOLDERS))
            if strange:
                raise BadInput(
                    f"{folder}: {strange[0]!r} stands beside 'train' but is none of {', '.join(SPLIT_FOLDERS)}."
                )
            if self.options.val_fraction or self.options.test_fraction:
                raise BadInput(f"{folder}: has its own train folder; leave out --val-fraction and --test-fraction.")
            by_split: dict[str, list[tuple[str, Path]]] = {s: [] for s in ("train", "val", "test")}
            for name, path in found.items():
                by_split[SPLIT_FOLDERS[name]] += self._of_classes(path)
            return {split: images for split, images in by_split.items() if images}
        return self._hash_split(self._of_classes(folder))

    def _of_classes(self, folder: Path) -> list[tuple[str, Path]]:
        images, skipped = [], []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            parts = path.relative_to(folder).parts
            if any(p.startswith(".") for p in parts):
                continue
            if path.suffix.lower() in EXTENSIONS and len(parts) > 1:
                images.append((parts[0], path))
            else:
                skipped.append(path)
        if skipped:
            print(
                f"{folder}: {len(skipped)} files are no images in a class folder, such as {skipped[0]}",
                file=sys.stderr,
            )
        if not images:
            raise BadInput(f"{folder}: no images in class folders. Expected {folder}/CLASS/IMAGE.jpg")
        return images

    def _hash_split(self, images: list[tuple[str, Path]]) -> dict[str, list[tuple[str, Path]]]:
        """The same share of every class; which files depends on their names alone."""
        shares = {"val": self.options.val_fraction, "test": self.options.test_fraction}
        by_class: dict[str, list[Path]] = {}
        for name, path in images:
            by_class.setdefault(name, []).append(path)
        chosen: dict[Path, str] = {}
        for paths in by_class.values():
            names = {p: str(p.relative_to(self.options.folder)) for p in paths}
            order = sorted(paths, key=lambda p: hashlib.blake2b(names[p].encode()).digest())
            for split, share in shares.items():
                for path in order[: round(len(paths) * share)]:
                    chosen[path] = split
                order = order[round(len(paths) * share) :]
        splits = ["train", *(s for s, share in shares.items() if share)]
        return {s: [(c, p) for c, p in images if chosen.get(p, "train") == s] for s in splits}


ENTRY = ImageFolder
