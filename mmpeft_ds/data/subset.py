"""Subsets of a split: a few shots of every class, some classes alone, or the official split of another benchmark.

A JSON file names the samples by key, so that all methods and runs train on the same images. data_prep/few_shot.py
writes such files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

import fsspec
import numpy as np

from mmpeft_ds.data.manifest import Manifest, local_path, sample_key
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import check_regular, write_json

HINT = "data_prep/few_shot.py DIR writes subsets of a data set"


@dataclass(frozen=True)
class Subset:
    """Contents of a subset file.

    Attributes:
        dataset: name of the data set.
        split: the split that the keys are of.
        keys: of the samples, in any order, each once.
        shots: samples per class, 0 = all.
        seed: of the random choice.
        protocol: how the samples were chosen, in words.
        classes: names of the classes that may occur, for protocols that leave some out; None: all of the data set.
        shards: `fingerprint` of the split when the samples were chosen; empty in files written by hand.
        file: path that it was read from; not stored.
    """

    dataset: str
    split: str
    keys: list[str]
    shots: int = 0
    seed: int = 0
    protocol: str = ""
    classes: list[str] | None = None
    shards: str = ""
    file: str = field(default="", compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def load(cls, path: str, manifest: Manifest, split: str) -> Subset:
        """Read the subset file `path`, given as it is or relative to the data set's directory.

        Raises:
            BadInput: one line: no such file, damaged, of another data set or split, made before the shards changed,
                with a key twice or one that the split does not have, or without keys.
        """
        raw = _read(path, manifest)
        try:
            known = {f for f in cls.__dataclass_fields__ if f != "file"}
            subset = cls(**{k: v for k, v in raw.items() if k in known}, file=path)
            subset._check_types()
        except (TypeError, ValueError) as error:
            raise BadInput(f"{path}: no subset ({error}). {HINT}.") from error
        subset._check(manifest, split)
        return subset

    def save(self, path: Path) -> None:
        """Write the file; the same subset gives the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {k: v for k, v in asdict(self).items() if k != "file"}
        write_json(path, content)

    def places(self, manifest: Manifest) -> list[np.ndarray]:
        """Shard -> sorted positions inside it, int64; empty arrays for shards without a chosen sample."""
        ends = list(accumulate(shard.samples for shard in manifest.shards(self.split)))
        numbers = np.sort(np.array([_number(key) for key in self.keys], dtype=np.int64))
        cuts = np.searchsorted(numbers, [0, *ends])
        return [numbers[a:b] - first for a, b, first in zip(cuts, cuts[1:], [0, *ends], strict=False)]

    def _check_types(self) -> None:
        texts = isinstance(self.keys, list) and all(isinstance(key, str) for key in self.keys)
        if not texts or not isinstance(self.dataset, str) or not isinstance(self.split, str):
            raise ValueError("`dataset` and `split` must be texts, `keys` a list of texts")
        if self.classes is not None and not all(isinstance(c, str) for c in self.classes):
            raise ValueError("`classes` must be a list of texts")

    def _check(self, manifest: Manifest, split: str) -> None:
        if (self.dataset, self.split) != (manifest.name, split):
            raise BadInput(
                f"{self.file}: chooses from {self.dataset!r} split {self.split!r}, not from {manifest.name!r} split "
                f"{split!r} ({manifest.dir}). {HINT}."
            )
        if self.shards and self.shards != fingerprint(manifest, split):
            raise BadInput(
                f"{self.file}: was made for other shards than {manifest.dir} has now. Run data_prep/few_shot.py "
                f"{manifest.dir} again, with --overwrite."
            )
        if not self.keys:
            raise BadInput(f"{self.file}: chooses no sample. {HINT}.")
        total = manifest.samples(split)
        for key in self.keys:
            number = _number(key)
            if not 0 <= number < total or sample_key(split, number) != key:
                raise BadInput(
                    f"{self.file}: {manifest.dir} has no sample {key!r}; its keys are {sample_key(split, 0)} to "
                    f"{sample_key(split, total - 1)}. {HINT}."
                )
        if len(set(self.keys)) < len(self.keys):
            double = next(key for key in self.keys if self.keys.count(key) > 1)
            raise BadInput(f"{self.file}: names {double} twice. {HINT}.")


def fingerprint(manifest: Manifest, split: str) -> str:
    """Hash of the bytes of a split; another one whenever a key may stand for another sample."""
    return hashlib.sha256("".join(shard.sha256 for shard in manifest.shards(split)).encode()).hexdigest()


def _number(key: str) -> int:
    """Position of a key in the split; -1 if it is not in our form."""
    digits = key.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _read(path: str, manifest: Manifest) -> dict:
    local = local_path(path)
    beside = f"{manifest.dir}/{path}"
    url = path if local is None or Path(local).is_absolute() or Path(local).is_file() else beside
    try:
        check_regular(local_path(url) or "")
        with fsspec.open(url, "rb") as stream:
            raw = json.loads(stream.read())
    except (OSError, ImportError) as error:
        tried = path if url == path else f"{path} (nor {beside})"
        raise BadInput(f"{tried}: no such subset file. {HINT}.") from error
    except ValueError as error:
        raise BadInput(f"{path}: no JSON ({' '.join(str(error).split())}). {HINT}.") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: holds a JSON {type(raw).__name__} instead of an object. {HINT}.")
    return raw
