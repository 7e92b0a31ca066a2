"""Pictures that training cannot use, as their headers show: counted when shards are written, and named by the report.

Their samples are stored all the same, and training leaves them out as bad samples. `verify.py --list-bad` names all
of them, and with --decode those whose pixels are damaged too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.duplicates import SHOWN, name_of
from data_prep.common.reading import check_picture
from data_prep.sources.base import RawSample
from mmpeft_ds.data.formats import MAX_ASPECT, MAX_PIXELS
from mmpeft_ds.data.parts import Part
from mmpeft_ds.errors import BadSample

ARRAY = "bad_pictures"  # of a part: (sample of the shard, position in REASONS) of each such sample
# Kind of the bad sample -> what the report says.
REASONS = {
    "image": "not a picture",
    "pixels": f"more than {MAX_PIXELS:,} pixels (data.max_pixels)",
    "aspect": f"more than {MAX_ASPECT} times as long as wide",
}


class BadPictures:
    """Looks at the pictures of the samples of one shard, and notes the samples that training will leave out."""

    def __init__(self) -> None:
        self.bad: list[tuple[int, int]] = []

    def samples(self, samples: Iterable[RawSample]) -> Iterator[RawSample]:
        """The samples, unchanged."""
        for number, sample in enumerate(samples):
            try:
                for _, data in sample.images:
                    check_picture(data)
            except BadSample as bad:
                self.bad.append((number, list(REASONS).index(bad.kind)))
            yield sample

    def numbers(self) -> dict[str, np.ndarray]:
        """The array for the part of the shard."""
        return {ARRAY: np.array(self.bad, dtype=np.int64).reshape(-1, 2)}


def by_reason(out: Path, parts: dict[str, list[Part]]) -> dict[str, dict[str, Any]]:
    """Split -> {`bad`: reason -> [number of samples, the source's names of the first ten]}; without splits that have
    none.

    Args:
        out: directory of the shards, which are all in place.
        parts: split -> parts of its shards in order.
    """
    accounts: dict[str, dict[str, Any]] = {}
    for split, of_split in parts.items():
        for part in of_split:
            # A part of an earlier version has no such array.
            for sample, kind in part.arrays().get(ARRAY, np.zeros((0, 2), dtype=np.int64)).tolist():
                counted = accounts.setdefault(split, {"bad": {}})["bad"]
                entry = counted.setdefault(list(REASONS.values())[kind], [0, []])
                entry[0] += 1
                if len(entry[1]) < SHOWN:
                    entry[1].append(name_of(out, part, sample))
    return accounts
